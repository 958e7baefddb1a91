"""All iterations of slot attention in kernels against Algorithm 1, by Triton's interpreter: see `tests/kernels.py`."""

import os
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.costs import count_macs
from narrows.errors import ImplementationUnavailable
from narrows.layers.slot_attention import NormedSlotAttention, SlotAttention
from narrows.ops.slot_attention import Settings, iterations, triton, update
from tests.launches import Launches
from tests.support import RoundedTo, assert_close, assert_within_budget_on_average, gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "run me as tests/kernels.py says"

READS = "_read", "_read_backward_rows", "_read_backward_tokens"
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


class Counted:
    """A kernel that writes its name down when it is launched."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


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
    options: dict[str, Any] = {"temperature": 0.7, "num_iterations": {"heads": 3, "biases, wide": 1}.get(form, 2)}
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


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of ours, two an iteration and one each way, and one for the tokens; then a product for each matrix."""
    launched: list[str] = []
    for module, names in ((update, ("_forward", "_backward")), (triton, READS)):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name, launched))
    layer, (tokens, slots) = make("one head", impl="triton"), (torch.randn(1, 9, 16), torch.randn(1, 3, 24))
    output = layer(tokens.requires_grad_(), slots=slots.requires_grad_(), num_iterations=3)
    assert launched == ["_forward", "_read"] * 3 + ["_forward"]
    launched.clear()
    with Launches() as found:
        output.slots.sum().backward()
    assert launched == ["_backward", "_read_backward_rows"] * 3 + ["_backward", "_read_backward_tokens"]
    assert found.operations["narrows::slot_iterations_backward"] == 1
    assert found.operations["mm"] + found.operations["bmm"] == 7


def test_measure_counts_what_the_plain_form_multiplies_and_what_backward_makes_anew() -> None:
    layer, (tokens, slots) = make("heads", impl="triton"), (torch.randn(2, 9, 33), torch.randn(2, 3, 12))
    settings = Settings(2, 2, False, 6**-0.5, 1e-8, 1e-5, 1e-5)
    made: list[Tensor] = []
    forms = {
        "triton": lambda: made.extend(layer(tokens.requires_grad_(), slots=slots.requires_grad_())),
        "plain": lambda: made.extend(iterations._plain(tokens, slots, layer._weights(), None, None, settings)),
    }
    counts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, form in forms.items():
            made.clear()
            counts[name] = count_macs(form), count_macs(lambda: sum(part.sum() for part in made).backward())
    assert counts["triton"][0] == counts["plain"][0]
    anew = 3 * 2 * 2 * 3 * 9 * 33 + 2 * 3 * 12 * 33  # three products with all tokens, and one with the map of the keys
    assert counts["triton"][1] == counts["plain"][1] + 2 * anew


def test_twice_differentiable() -> None:
    layer, inputs = make("joint heads and output"), [torch.randn(2, 7, 16), torch.randn(2, 3, 10)]
    mask = torch.rand(2, 7) > 0.3
    second = []
    for impl in ("triton", "reference"):
        layer.impl = impl
        tokens, slots = (value.detach().requires_grad_() for value in inputs)
        output = layer(tokens, mask, slots)
        together = torch.cat([part.flatten() for part in output])
        wanted = [tokens, slots, *(value for name, value in layer.named_parameters() if "initial_slots" not in name)]
        first = torch.autograd.grad(together, wanted, torch.linspace(-1, 1, together.numel()), create_graph=True)
        second.append([g.detach() for g in torch.autograd.grad(sum((g * g).sum() for g in first), wanted)])
    for value, expected in zip(*second, strict=True):
        assert_close(value, expected, 1e-3)


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
    for kind, options in ((NormedSlotAttention, {}), (SlotAttention, {"mlp_dim": 0})):
        with pytest.raises(ImplementationUnavailable, match="its kernels start from slots as they are and have an MLP"):
            kind(16, num_slots=3, impl="triton", **options)(tokens)
    with pytest.raises(ImplementationUnavailable, match="it has no rule for"):
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
