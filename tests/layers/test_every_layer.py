"""What every layer promises, checked over every case in `tests/cases`."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tests.cases import LayerCase, all_cases
from tests.support import assert_close, assert_within_budget, parameter_gradients

CASES = all_cases()
KEYS = Path(__file__).parents[1] / "snapshots" / "layer_state_dict_keys.json"

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_masked_layer = pytest.mark.parametrize(
    ("case", "mask_name"),
    [(case, mask_name) for case in CASES for mask_name in case.padded],
    ids=lambda value: value.name if isinstance(value, LayerCase) else value,
)


def build(case: LayerCase, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return case.build(**kwargs).eval()


def inputs(case: LayerCase, batch: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return case.inputs(batch)


def call(case: LayerCase, layer: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name; a layer that draws noise draws the same for the same batch size."""
    generator = {"generator": torch.Generator().manual_seed(3)} if case.random else {}
    return case.outputs(layer(**arguments, **generator))


def cast(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}


def total(outputs: dict[str, Tensor]) -> Tensor:
    """All floating outputs as one vector, so that one projection sees every part."""
    return torch.cat([value.flatten().double() for value in outputs.values() if value.is_floating_point()])


def token_shape(case: LayerCase, arguments: dict[str, Tensor], mask_name: str) -> tuple[int, ...]:
    return tuple(arguments[case.padded[mask_name]].shape[: case.pad_axis + 1])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_reference(case: LayerCase, dtype: torch.dtype) -> None:
    arguments = inputs(case)
    oracle = call(case, build(case, impl="reference").double(), cast(arguments, torch.float64))
    for impl in case.impls:
        outputs = call(case, build(case, impl=impl).to(dtype), cast(arguments, dtype))
        # What rounding the inputs and parameters alone costs is what the plain form is allowed to lose.
        plain = call(
            case,
            build(case, impl="reference").to(dtype).double(),
            cast(cast(arguments, dtype), torch.float64),
        )
        for name, value in outputs.items():
            if not value.is_floating_point():
                continue
            assert value.dtype == dtype, f"{name} is {value.dtype}"
            lost = plain[name].to(dtype)
            assert_within_budget(value, lost, oracle[name], factor=4.0)


@every_layer
def test_autocast_runs_and_stays_near_float32(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    expected = call(case, layer, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = call(case, layer, arguments)
        total(outputs).sum().backward()
    for name, value in outputs.items():
        if value.is_floating_point():
            assert torch.isfinite(value).all()
            scale = expected[name].abs().max().item()
            # bfloat16 keeps 8 bits; layers of a few products lose a few of them.
            assert (value.float() - expected[name]).abs().max().item() <= 0.1 * max(scale, 1.0)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


@every_layer
def test_every_parameter_gets_a_finite_gradient(case: LayerCase) -> None:
    layer = build(case)
    for name, gradient in parameter_gradients(layer, total(call(case, layer, inputs(case)))).items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, f"{name} gets no gradient"


@every_layer
def test_gradients_lie_in_memory_as_their_parameters_do(case: LayerCase) -> None:
    # Training would have to bring them into order, which for many experts took longer than all the rest.
    layer = build(case)
    gradients = parameter_gradients(layer, total(call(case, layer, inputs(case))))
    for name, parameter in layer.named_parameters():
        strides = zip(gradients[name].stride(), parameter.stride(), parameter.shape, strict=True)
        assert all(ours == theirs for ours, theirs, size in strides if size > 1), name


@every_layer
def test_implementations_agree(case: LayerCase) -> None:
    arguments = cast(inputs(case), torch.float64)
    layers = [build(case, impl=impl).double() for impl in case.impls]
    expected = call(case, layers[0], arguments)
    gradients = parameter_gradients(layers[0], total(expected))
    for layer in layers[1:]:
        outputs = call(case, layer, arguments)
        for name, value in outputs.items():
            assert_close(value.double(), expected[name].double(), 1e-9)
        for name, gradient in parameter_gradients(layer, total(outputs)).items():
            assert_close(gradient, gradients[name], 1e-8)


@every_layer
def test_evaluation_is_deterministic(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    first, second = call(case, layer, arguments), call(case, layer, arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_layer
def test_an_output_does_not_depend_on_the_rest_of_the_batch(case: LayerCase) -> None:
    if case.random:
        pytest.skip("noise is drawn for the batch; covered with given slots by the mechanism's own test")
    layer, arguments = build(case).double(), cast(inputs(case, 4), torch.float64)
    together = call(case, layer, arguments)
    for index in range(4):
        alone = call(case, layer, {name: value[index : index + 1] for name, value in arguments.items()})
        for name, value in alone.items():
            assert_close(value.double(), together[name][index : index + 1].double(), 1e-9)


@every_layer
def test_strides_do_not_matter(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    strided = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) if value.ndim > 1 else value
        for name, value in arguments.items()
    }
    expected, outputs = call(case, layer, arguments), call(case, layer, strided)
    for name, value in outputs.items():
        assert_close(value.double(), expected[name].double(), 1e-5)


@every_masked_layer
def test_a_full_mask_changes_nothing(case: LayerCase, mask_name: str) -> None:
    layer, arguments = build(case).double(), cast(inputs(case), torch.float64)
    mask = torch.ones(token_shape(case, arguments, mask_name), dtype=torch.bool)
    expected = call(case, layer, arguments)
    for name, value in call(case, layer, {**arguments, mask_name: mask}).items():
        assert_close(value.double(), expected[name].double(), 1e-9)


@every_masked_layer
def test_padding_gives_each_sample_what_it_gets_alone(case: LayerCase, mask_name: str) -> None:
    layer, arguments = build(case).double(), cast(inputs(case), torch.float64)
    padded = case.padded[mask_name]
    padding = 3 * torch.randn_like(arguments[padded])
    arguments_wide = {**arguments, padded: torch.cat((arguments[padded], padding), case.pad_axis)}
    shape = token_shape(case, arguments_wide, mask_name)
    real = shape[-1] // 2
    mask = (torch.arange(shape[-1]) < real).expand(shape)
    expected = call(case, layer, arguments)
    outputs = call(case, layer, {**arguments_wide, mask_name: mask})
    for name, value in outputs.items():
        if name in case.per_token:
            assert (value.narrow(case.pad_axis, real, real) == 0).all(), f"{name} is not 0 at masked tokens"
            value = value.narrow(case.pad_axis, 0, real)
        elif value.shape != expected[name].shape:  # a weight for each token, [..., N]
            assert (value[..., real:] == 0).all(), f"{name} is not 0 at masked tokens"
            value = value[..., :real]
        assert_close(value.double(), expected[name].double(), 1e-9)


@every_masked_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sample_without_any_token_is_finite(case: LayerCase, mask_name: str, dtype: torch.dtype) -> None:
    layer, arguments = build(case).to(dtype), cast(inputs(case), dtype)
    arguments = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in arguments.items()}
    shape = token_shape(case, arguments, mask_name)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1] = False
    outputs = call(case, layer, {**arguments, mask_name: mask})
    total(outputs).sum().backward()
    for name, value in outputs.items():
        assert torch.isfinite(value.double()).all(), name
        if name in case.per_token:
            assert (value[1] == 0).all(), f"{name} is not 0 for a sample without tokens"
    for name, tensor in {**dict(layer.named_parameters()), **arguments}.items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name


@every_layer
def test_saved_weights_come_back_bit_by_bit(case: LayerCase) -> None:
    layer, other = build(case), case.build()
    other.load_state_dict(load(save(layer.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == layer.state_dict().keys()


@every_layer
def test_state_dict_keys_are_what_they_were(case: LayerCase) -> None:
    """Keys are public: weights that people saved must load. Write the snapshot anew only with a note in CHANGELOG."""
    snapshot = json.loads(KEYS.read_text())
    assert case.name in snapshot, f"add {case.name} to {KEYS.name}: python -m tests.snapshots"
    assert {name: list(value.shape) for name, value in build(case).state_dict().items()} == snapshot[case.name]


@every_layer
@pytest.mark.compiled
def test_compiles_to_one_graph(case: LayerCase) -> None:
    torch._dynamo.reset()
    layer, arguments = build(case), inputs(case)
    kwargs = {"generator": None} if case.random else {}

    def outputs_and_gradients(function: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(5)
        outputs = case.outputs(function(**arguments, **kwargs))
        return outputs, dict(parameter_gradients(layer, total(outputs)))

    expected, expected_gradients = outputs_and_gradients(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, gradients = outputs_and_gradients(compiled)
    for name, value in outputs.items():
        assert_close(value.double(), expected[name].double(), 1e-5)
    for name, value in gradients.items():
        assert_close(value, expected_gradients[name], 1e-4)


@every_layer
@pytest.mark.compiled
def test_exports_with_any_batch(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in arguments}
    if case.dynamic and case.padded:
        tokens = next(iter(case.padded.values()))
        shapes[tokens] = {0: batch, case.pad_axis: torch.export.Dim("tokens", min=2, max=4096)}
    with torch.no_grad():
        program = torch.export.export(layer, (), kwargs=arguments, dynamic_shapes=shapes, strict=False).module()
        others = inputs(case, 5)
        if case.dynamic and case.padded:
            tokens = next(iter(case.padded.values()))
            length = others[tokens].shape[case.pad_axis]
            others[tokens] = torch.cat((others[tokens], others[tokens].narrow(case.pad_axis, 0, 1)), case.pad_axis)
            assert others[tokens].shape[case.pad_axis] == length + 1
        torch.manual_seed(5)
        expected = case.outputs(layer(**others))
        torch.manual_seed(5)
        outputs = case.outputs(program(**others))
    for name, value in outputs.items():
        assert_close(value.double(), expected[name].double(), 1e-5)
