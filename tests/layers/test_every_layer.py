"""What every layer promises, checked over every case in `tests/cases`."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tests.cases import LayerCase
from tests.layers.every_layer import (
    CASES,
    build,
    call,
    cast,
    every_implementation,
    every_layer,
    inputs,
    total,
)
from tests.support import (
    RoundedTo,
    assert_close,
    assert_within_budget_on_average,
    parameter_gradients,
)

# Over so many draws the greatest error is averaged; in one, either may be lucky.
DRAWS = 8
KEYS = Path(__file__).parents[1] / "snapshots" / "layer_state_dict_keys.json"

every_masked_layer = pytest.mark.parametrize(
    ("case", "mask_name"),
    [(case, mask_name) for case in CASES for mask_name in case.padded],
    ids=lambda value: value.name if isinstance(value, LayerCase) else value,
)


def token_shape(case: LayerCase, arguments: dict[str, Tensor], mask_name: str) -> tuple[int, ...]:
    return tuple(arguments[case.padded[mask_name]].shape[: case.pad_axis + 1])


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_loses_what_rounding_costs(case: LayerCase, impl: str, dtype: torch.dtype) -> None:
    def outputs(layer: nn.Module, arguments: dict[str, Tensor]) -> list[Tensor]:
        found = call(case, layer.to(dtype), cast(arguments, dtype)).values()
        assert all(value.dtype == dtype for value in found if value.is_floating_point())
        return [value for value in found if value.is_floating_point()]

    assert_within_budget_on_average([compare(case, impl, dtype, outputs, seed) for seed in range(DRAWS)])


@every_implementation
def test_autocast_loses_what_rounding_costs(case: LayerCase, impl: str) -> None:
    def outputs(layer: nn.Module, arguments: dict[str, Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(case, layer, arguments)
        total(found).sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
        return [value.detach() for value in found.values() if value.is_floating_point()]

    assert_within_budget_on_average([compare(case, impl, torch.bfloat16, outputs, seed) for seed in range(DRAWS)])


def compare(
    case: LayerCase,
    impl: str,
    dtype: torch.dtype,
    outputs: Callable[[nn.Module, dict[str, Tensor]], list[Tensor]],
    seed: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What a layer gives, what the reference gives where every operation is rounded, and what it gives exactly."""
    arguments = inputs(case, seed=seed)
    reference = build(case, impl="reference", seed=seed).double()
    exact = call(case, reference, cast(arguments, torch.float64))
    rounded = build(case, impl="reference", seed=seed).to(dtype).double()
    with torch.no_grad(), RoundedTo(dtype):
        plain = call(case, rounded, cast(cast(arguments, dtype), torch.float64))
    return (
        outputs(build(case, impl=impl, seed=seed), arguments),
        [value for value in plain.values() if value.is_floating_point()],
        [value.detach() for value in exact.values() if value.is_floating_point()],
    )


@every_implementation
def test_autocast_leaves_float64_alone(case: LayerCase, impl: str) -> None:
    layer, arguments = build(case, impl=impl).double(), cast(inputs(case), torch.float64)
    expected = call(case, layer, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = call(case, layer, arguments)
    for name, value in outputs.items():
        assert value.dtype == expected[name].dtype
        assert_close(value.double(), expected[name].double(), 1e-12)


@every_implementation
def test_an_empty_batch_works_forward_and_backward(case: LayerCase, impl: str) -> None:
    layer = build(case, impl=impl)
    arguments = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in inputs(case, 0).items()}
    outputs = call(case, layer, arguments)
    expected = call(case, layer, inputs(case, 2))
    assert {n: v.shape[1:] for n, v in outputs.items()} == {n: v.shape[1:] for n, v in expected.items()}
    assert all(value.shape[0] == 0 for value in outputs.values())
    total(outputs).sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in layer.parameters())


def as_function(case: LayerCase, impl: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A layer as a function of its first floating-point argument, with nothing left to chance, and a value for it."""
    layer, arguments = build(case, impl=impl).double(), cast(inputs(case, 2), torch.float64)
    if case.random:
        arguments["slots"] = torch.randn(2, 4, 12, dtype=torch.float64)
    name = next(name for name, value in arguments.items() if value.is_floating_point())
    return lambda tokens: total(case.outputs(layer(**{**arguments, name: tokens}))), arguments[name]


@every_implementation
def test_forward_and_reverse_derivatives_agree(case: LayerCase, impl: str) -> None:
    function, tokens = as_function(case, impl)
    tangent = torch.randn_like(tokens)
    output, along = torch.func.jvp(function, (tokens,), (tangent,))
    direction = torch.randn_like(output)
    _, pullback = torch.func.vjp(function, tokens)
    assert_close(function(tokens), output, 1e-12)
    assert_close(along @ direction, (pullback(direction)[0] * tangent).sum(), 1e-9)
    leaf = tokens.clone().requires_grad_()
    assert_close(pullback(direction)[0], torch.autograd.grad(function(leaf) @ direction, leaf)[0], 1e-9)
    projection = torch.randn(2, output.numel(), dtype=torch.float64)
    by_rows = torch.func.jacrev(lambda tokens: projection @ function(tokens))(tokens)
    by_columns = torch.func.jacfwd(lambda tokens: projection @ function(tokens))(tokens)
    assert_close(by_rows, by_columns, 1e-9)


@every_implementation
def test_hessian_vector_products_are_differences_of_gradients(case: LayerCase, impl: str) -> None:
    function, tokens = as_function(case, impl)
    gradient = torch.func.grad(lambda tokens: function(tokens).square().sum())
    tangent = torch.randn_like(tokens)
    _, product = torch.func.jvp(gradient, (tokens,), (tangent,))
    step = 1e-5
    difference = (gradient(tokens + step * tangent) - gradient(tokens - step * tangent)) / (2 * step)
    assert_close(product, difference, 1e-5)


@every_implementation
def test_vmap_gives_what_a_loop_gives(case: LayerCase, impl: str) -> None:
    function, tokens = as_function(case, impl)
    several = torch.stack([tokens, tokens.flip(0), 2 * tokens])
    assert_close(torch.func.vmap(function)(several), torch.stack([function(one) for one in several]), 1e-9)


@every_implementation
def test_gradients_of_parameters_through_functional_call(case: LayerCase, impl: str) -> None:
    layer, arguments = build(case, impl=impl).double(), cast(inputs(case, 2), torch.float64)
    if case.random:
        arguments["slots"] = torch.randn(2, 4, 12, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(layer, parameters, (), arguments)
        return total(case.outputs(outputs)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(dict(layer.named_parameters())).backward()
    for name, parameter in layer.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(gradients[name], expected, 1e-9)


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


@every_masked_layer
def test_what_stands_at_masked_places_changes_nothing(case: LayerCase, mask_name: str) -> None:
    arguments = inputs(case)
    padded, shape = case.padded[mask_name], token_shape(case, arguments, mask_name)
    mask = torch.rand(shape) < 0.6
    mask[..., 0], mask[..., -1] = True, False

    def results(impl: str, garbage: float) -> dict[str, Tensor]:
        layer = build(case, impl=impl)
        filled = arguments[padded].where(expand(mask, arguments[padded]), garbage)
        given = {**arguments, padded: filled, mask_name: mask}
        leaves = {n: v.detach().requires_grad_() for n, v in given.items() if v.is_floating_point()}
        outputs = call(case, layer, {**given, **leaves})
        found = torch.autograd.grad(
            total(outputs).square().sum(), [*leaves.values(), *layer.parameters()], allow_unused=True
        )
        names = [*leaves, *dict(layer.named_parameters())]
        return {**outputs, **{f"gradient of {n}": g for n, g in zip(names, found, strict=True) if g is not None}}

    for impl in case.impls:
        expected = results(impl, 0.0)
        for garbage in (float("nan"), float("inf"), 1e30):
            for name, value in results(impl, garbage).items():
                assert torch.equal(value, expected[name]), f"{impl}: {name} with {garbage} at masked places"


def expand(mask: Tensor, tokens: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (tokens.ndim - mask.ndim)).expand_as(tokens)


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
