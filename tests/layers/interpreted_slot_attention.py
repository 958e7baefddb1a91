"""All iterations of slot attention in kernels against Algorithm 1, by Triton's interpreter: see `tests/kernels.py`."""

import os
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.errors import ImplementationUnavailable
from narrows.layers.slot_attention import SlotAttention
from narrows.ops.slot_attention import iterations
from tests.support import RoundedTo, assert_close, assert_within_budget_on_average, gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "run me as tests/kernels.py says"

FORMS: dict[str, dict[str, Any]] = {
    "one head": {"dim": 16, "slot_dim": 24, "mlp_dim": 40},
    "biases, wide": {"dim": 20, "slot_dim": 70, "qkv_bias": True, "mlp_dim": 130},
    "heads": {"dim": 33, "slot_dim": 12, "heads": 2},
    "joint heads and output": {
        "dim": 16,
        "slot_dim": 10,
        "heads": 3,
        "head_dim": 5,
        "joint_heads": True,
        "qkv_bias": True,
    },
}


def make(form: str, **options: Any) -> SlotAttention:
    layer = SlotAttention(num_slots=3, num_iterations=2, **FORMS[form], **options)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def results(layer: nn.Module, impl: str, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Slots, attention, gradients of tokens, of the first slots and of all parameters that the call used."""
    layer.impl = impl
    tokens, slots = (value.detach().requires_grad_() for value in inputs)
    output = layer(tokens, slots=slots, **options)
    parameters = [value for name, value in layer.named_parameters() if "initial_slots" not in name]
    grads = gradients(torch.cat([part.flatten() for part in output]), tokens, slots, *parameters)
    assert all(grad.stride() == value.stride() for grad, value in zip(grads[2:], parameters, strict=True))
    return [*(part.detach() for part in output), *grads[:2], torch.cat([value.flatten() for value in grads[2:]])]


@pytest.mark.parametrize(("form", "masked"), [("one head", False), *((form, True) for form in FORMS)])
def test_is_algorithm_1_in_float32(form: str, masked: bool) -> None:
    layer = make(form)
    options: dict[str, Any] = {"temperature": 0.7, "num_iterations": 2 + (form == "heads")}
    if masked:
        mask = torch.rand(2, 37) > 0.3
        mask[1] = False
        options |= {"mask": mask, "slot_mask": torch.tensor([[True, True, True], [False, True, True]])}
    inputs = [torch.randn(2, 37, layer.dim), torch.randn(2, 3, layer.gru.hidden_size)]
    if form == "heads":
        inputs[0] = inputs[0].mT.contiguous().mT
    exact = results(deepcopy(layer).double(), "reference", [value.double() for value in inputs], **options)
    for value, expected in zip(results(layer, "triton", inputs, **options), exact, strict=True):
        assert_close(value, expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_the_textbook_in_low_precision(dtype: torch.dtype) -> None:
    draws = []
    for seed in range(4):  # In one draw, either may have a hidden unit on the other side of 0.
        torch.manual_seed(seed)
        layer = make("biases, wide" if seed % 2 else "joint heads and output").to(dtype)
        inputs = [torch.randn(1, 37, layer.dim).to(dtype), torch.randn(1, 3, layer.gru.hidden_size).to(dtype)]
        options = {"mask": torch.rand(1, 37) > 0.3} if seed == 1 else {}
        exact, wide = deepcopy(layer).double(), [value.double() for value in inputs]
        with RoundedTo(dtype):
            plain = results(exact, "reference", wide, **options)
        draws.append((results(layer, "triton", inputs, **options), plain, results(exact, "reference", wide, **options)))
    assert_within_budget_on_average(draws)


def test_autocast_multiplies_in_bfloat16_and_keeps_slots_in_float32() -> None:
    layer = make("one head", impl="triton")
    inputs = [torch.randn(2, 37, 16), torch.randn(2, 3, 24)]
    exact = results(deepcopy(layer).double(), "reference", [value.double() for value in inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots, attention = layer(inputs[0], slots=inputs[1])
    assert slots.dtype == attention.dtype == torch.float32
    (slots.sum() + attention.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for n, p in layer.named_parameters() if "initial_slots" not in n)
    assert 1e-5 < (slots.double() - exact[0]).abs().max() < 0.1


def test_masked_tokens_and_empty_samples() -> None:
    layer = make("joint heads and output", impl="triton")
    tokens, slots, mask = torch.randn(2, 20, 16), torch.randn(2, 3, 10), torch.rand(2, 20) > 0.4
    expected = layer(tokens, mask, slots)
    dirty = layer(tokens.masked_fill(~mask[..., None], torch.nan), mask, slots)
    assert all(torch.equal(one, other) for one, other in zip(dirty, expected, strict=True))
    layer.impl = "reference"
    none = layer(tokens[:, :0], slots=slots).slots
    layer.impl = "triton"
    assert_close(layer(tokens[:, :0], slots=slots).slots, none)
    assert layer(tokens[:0], slots=slots[:0]).slots.shape == (0, 3, 10)


def test_launches_two_kernels_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for module, name in ((iterations, "_update"), (iterations.Read, "forward")):
        original = getattr(module, name)

        class Counted:
            def __init__(self, original: Any = original, name: str = name) -> None:
                self.original, self.name = original, name

            def __getitem__(self, grid: Any) -> Any:
                launched.append(self.name)
                return self.original[grid]

        if name == "_update":
            monkeypatch.setattr(module, name, Counted())
        else:

            def counted(*arguments: Any, original: Any = original) -> Any:
                launched.append("read")
                return original(*arguments)

            monkeypatch.setattr(module, name, counted)
    make("one head", impl="triton")(torch.randn(1, 9, 16), num_iterations=3)
    assert launched == ["_update", "read"] * 3 + ["_update"]


def test_what_runs_can_be_asked_and_says_why_not() -> None:
    layer, tokens = make("one head"), torch.randn(1, 9, 16)
    assert layer.implementation(tokens) == "absorbed"  # "auto" takes kernels on CUDA only
    layer.impl = "triton"
    assert layer.implementation(tokens) == "triton"
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ImplementationUnavailable, match="impl='triton' cannot run here: mlp has hooks"):
        layer(tokens)
    handle.remove()
    with pytest.raises(ImplementationUnavailable, match="it takes 64 slots of all heads"):
        layer(tokens, num_slots=65)
    with pytest.raises(ImplementationUnavailable, match="it has one derivative"):
        torch.func.vmap(lambda x: layer(x, slots=torch.zeros(1, 3, 24)).slots)(tokens[None])


def test_compiles_to_one_graph_for_all_sizes() -> None:
    layer = make("one head", impl="triton")
    counts: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counts.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for batch, number, tokens in ((2, 3, 5), (3, 5, 8), (4, 9, 6)):
        inputs = torch.randn(batch, tokens, 16), torch.rand(batch, tokens) > 0.3, torch.randn(batch, number, 24)
        for value, expected in zip(compiled(*inputs), layer(*inputs), strict=True):
            assert torch.equal(value, expected)
    assert len(counts) == 1


def test_gradients_of_a_compiled_layer() -> None:
    layer, inputs = make("one head"), [torch.randn(2, 9, 16), torch.randn(2, 3, 24)]
    expected = results(layer, "triton", inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.impl = "triton"
    tokens, slots = (value.requires_grad_() for value in inputs)
    output = compiled(tokens, slots=slots)
    grads = gradients(torch.cat([part.flatten() for part in output]), tokens, slots)
    for value, wanted in zip([*output, *grads], expected[:4], strict=True):
        assert_close(value, wanted)


def test_exports_plain_operations_unless_asked() -> None:
    layer, tokens = make("one head").eval(), torch.randn(2, 9, 16)
    for impl, kernels in (("auto", False), ("triton", True)):
        layer.impl = impl
        program = torch.export.export(layer, (tokens,), strict=False)
        assert kernels == any("narrows" in str(node.target) for node in program.graph.nodes)
