"""A layer behaves as any `nn.Module`: what people put on or into its submodules works, whatever implementation runs."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from narrows.layers.soft_moe import StackedLinear
from tests.cases import LayerCase
from tests.layers.every_layer import CASES, build, call, cast, every_layer, inputs, total
from tests.support import assert_close, gradients

with_linear_maps = pytest.mark.parametrize(
    "case",
    [case for case in CASES if any(isinstance(module, nn.Linear) for module in case.construct().modules())],
    ids=lambda case: case.name,
)


def double(case: LayerCase, **kwargs: object) -> tuple[nn.Module, dict[str, Tensor]]:
    return build(case, **kwargs).double(), cast(inputs(case), torch.float64)


def linear_maps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear | StackedLinear))


def called_submodules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All but the layer itself and bare containers, which nobody calls."""
    return ((n, m) for n, m in layer.named_modules() if n and type(m).forward is not nn.Module.forward)


def differs(outputs: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return (total(outputs) - total(others)).abs().max().item() > 1e-6


@every_layer
def test_lora_changes_the_output_trains_and_merges(case: LayerCase) -> None:
    layer, arguments = double(case)
    plain = call(case, layer, arguments)
    names = [(name, isinstance(module, StackedLinear)) for name, module in linear_maps(layer)]
    if not names:
        pytest.skip("no linear map")
    config = peft.LoraConfig(
        r=2,
        target_modules=[name for name, stacked in names if not stacked] or None,
        target_parameters=[f"{name}.weight" for name, stacked in names if stacked] or None,
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(layer, config).double().eval()
    outputs = call(case, adapted, arguments)
    assert differs(outputs, plain)
    adapters = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) >= 2 * len(names)
    for name, gradient in zip(adapters, gradients(total(outputs), *adapters.values()), strict=True):
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
    merged = adapted.merge_and_unload()
    assert_close(total(call(case, merged, arguments)), total(outputs), 1e-9)


@every_layer
def test_hooks_of_every_submodule_fire(case: LayerCase) -> None:
    layer, arguments = double(case)
    arguments = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in arguments.items()}
    expected = call(case, layer, arguments)
    fired: set[tuple[str, str]] = set()
    wanted: set[tuple[str, str]] = set()
    for name, module in called_submodules(layer):
        module.register_forward_pre_hook(lambda *_, name=name: fired.add((name, "before")))
        module.register_forward_hook(lambda *_, name=name: fired.add((name, "after")))
        wanted |= {(name, "before"), (name, "after")}
        if next(module.parameters(), None) is not None:
            module.register_full_backward_hook(lambda *_, name=name: fired.add((name, "backward")))
            wanted.add((name, "backward"))
    outputs = call(case, layer, arguments)
    total(outputs).square().sum().backward()
    assert wanted <= fired, f"never fired: {sorted(wanted - fired)}"
    assert_close(total(outputs), total(expected), 1e-9)


@every_layer
def test_a_hook_that_changes_a_submodule_changes_the_layer(case: LayerCase) -> None:
    layer, arguments = double(case)
    expected = call(case, layer, arguments)
    for name, module in called_submodules(layer):
        if isinstance(module, nn.Linear | StackedLinear | nn.LayerNorm | nn.RMSNorm | nn.GRUCell):
            handle = module.register_forward_hook(lambda module, args, output: output.roll(1, -1))
            assert differs(call(case, layer, arguments), expected), f"{name} was not called"
            handle.remove()
            assert_close(total(call(case, layer, arguments)), total(expected), 1e-9)


def pruned(module: nn.Module) -> object:
    return prune.l1_unstructured(module, "weight", amount=0.5)


@with_linear_maps
@pytest.mark.parametrize(
    "tool",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        pruned,
    ],
    ids=["spectral_norm", "weight_norm", "spectral_norm parametrization", "weight_norm parametrization", "pruning"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_reparametrised_weights_train(case: LayerCase, tool: Callable[[Any], object]) -> None:
    layer, arguments = double(case)
    plain = deepcopy(layer)
    names = [name for name, module in linear_maps(layer) if isinstance(module, nn.Linear)]
    for name in names:
        tool(layer.get_submodule(name))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(3):
        layer.train()
        optimizer.zero_grad()
        total(call(case, layer, arguments)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
        optimizer.step()
        layer.eval()
        outputs = call(case, layer, arguments)
        weights = {name: value.detach() for name, value in layer.named_parameters() if name in plain.state_dict()}
        effective = {f"{name}.weight": layer.get_submodule(name).weight.detach() for name in names}
        plain.load_state_dict({**plain.state_dict(), **weights, **effective})
        assert_close(total(outputs), total(call(case, plain, arguments)), 1e-9)


@every_layer
def test_a_changed_eps_changes_the_output_of_every_implementation(case: LayerCase) -> None:
    _, arguments = double(case)
    norms = [n for n, m in case.construct().named_modules() if isinstance(getattr(m, "eps", None), float) and n]
    for name in norms:
        results = []
        for impl in case.impls:
            layer, _ = double(case, impl=impl)
            before = call(case, layer, arguments)
            layer.get_submodule(name).eps = 0.3
            results.append(call(case, layer, arguments))
            assert differs(results[-1], before), f"{impl} ignores {name}.eps"
        for result in results[1:]:
            assert_close(total(result), total(results[0]), 1e-9)


@with_linear_maps
def test_int8_weights_of_torchao_are_used(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    plain = deepcopy(layer)
    expected = call(case, layer, arguments)
    quantize_(layer, Int8WeightOnlyConfig())
    outputs = call(case, layer, arguments)
    assert differs(outputs, expected)
    for name, module in linear_maps(layer):
        if isinstance(module, nn.Linear):
            weight: Any = module.weight
            plain.get_submodule(name).weight = nn.Parameter(weight.dequantize())
    assert_close(total(outputs), total(call(case, plain, arguments)), 1e-4)


@with_linear_maps
def test_int8_weights_of_bitsandbytes_are_used(case: LayerCase) -> None:
    layer, arguments = build(case), inputs(case)
    expected = call(case, layer, arguments)
    for name, module in list(linear_maps(layer)):
        if isinstance(module, nn.Linear):
            bias = module.bias is not None
            int8 = bitsandbytes.nn.Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False)
            int8.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            int8.bias = module.bias
            layer.set_submodule(name, int8.to("cpu"))
    outputs = call(case, layer, arguments)
    assert differs(outputs, expected)
    error = (total(outputs) - total(expected)).norm() / total(expected).norm()
    assert error < 0.25, f"differs by {error:.2f} of its length: weights of 8 bits lose less"


@every_layer
def test_an_offloaded_layer_runs(case: LayerCase) -> None:
    layer, arguments = double(case)
    expected = call(case, layer, arguments)
    offloaded = cpu_offload(layer, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_close(total(call(case, offloaded, arguments)), total(expected), 1e-9)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_can_be_made_in_low_precision(case: LayerCase, dtype: torch.dtype) -> None:
    explicit = case.construct(dtype=dtype)
    torch.set_default_dtype(dtype)
    try:
        by_default = case.construct()
    finally:
        torch.set_default_dtype(torch.float32)
    moved: Any = case.construct().to(dtype)
    before = deepcopy(moved.state_dict())
    moved.reset_parameters()
    assert any(not torch.equal(value, before[name]) for name, value in moved.state_dict().items())
    for layer in (explicit, by_default, moved):
        assert all(parameter.dtype == dtype for parameter in layer.parameters())
        assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
        outputs = call(case, layer.eval(), cast(inputs(case), dtype))
        assert torch.isfinite(total(outputs)).all()


@every_layer
def test_the_meta_device_gives_shapes(case: LayerCase) -> None:
    layer = case.construct(device="meta").eval()
    assert all(parameter.is_meta for parameter in layer.parameters())
    arguments = inputs(case)
    outputs = case.outputs(layer(**{name: value.to("meta") for name, value in arguments.items()}))
    expected = call(case, build(case), arguments)
    assert {name: (value.shape, value.dtype) for name, value in outputs.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }


@every_layer
def test_resetting_gives_the_distribution_of_construction(case: LayerCase) -> None:
    """As FSDP makes large models: on the meta device, then `to_empty` and `reset_parameters`."""
    draws = 50
    made: dict[str, list[Tensor]] = {}
    reset: dict[str, list[Tensor]] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        for name, value in case.construct().state_dict().items():
            made.setdefault(name, []).append(value)
        layer: Any = case.construct(device="meta").to_empty(device="cpu")
        for value in layer.state_dict().values():
            value.fill_(torch.nan)
        torch.manual_seed(seed + draws)
        layer.reset_parameters()
        for name, value in layer.state_dict().items():
            reset.setdefault(name, []).append(value)
    for name in made:
        ours, theirs = torch.stack(reset[name]), torch.stack(made[name])
        deviation = theirs.std().item()
        if (theirs == theirs[0]).all():
            assert torch.equal(ours, theirs), name
            continue
        # Six standard errors of a mean and of a standard deviation, of distributions with tails no heavier than normal.
        error = 6 * deviation * (2 / ours.numel()) ** 0.5
        assert abs(ours.mean().item() - theirs.mean().item()) <= error, name
        assert abs(ours.std().item() - deviation) <= error, name


@every_layer
def test_a_copy_is_independent_and_equal(case: LayerCase) -> None:
    layer, arguments = double(case)
    copy = deepcopy(layer)
    expected = call(case, layer, arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert_close(total(call(case, copy, arguments)), total(expected), 1e-12)
