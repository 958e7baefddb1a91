"""Slot attention on queries, keys and values: both forms against loops, masks, precision, derivatives, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import NarrowsError
from narrows.ops.slot_attention import Weights, read_slots, slot_attention
from tests.kernels import CHIPS, compile_for
from tests.support import assert_close, assert_within_budget_on_average, gradients

every_implementation = pytest.mark.parametrize("impl", ["reference", "mixed"])  # kernels: interpreted_slot_attention.py
Inputs = dict[str, Tensor]


def draw(B: int = 2, H: int = 2, G: int = 2, K: int = 4, N: int = 9, E: int = 3, V: int = 5) -> Inputs:
    """Queries, keys, values and bias in float64."""
    shapes = {"queries": (B, H, K, E), "keys": (B, G, N, E), "values": (B, G, N, V), "bias": (B, H, K)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def ragged(*shape: int) -> Tensor:
    """A mask with holes; the first sample has one real entry only."""
    mask = torch.rand(shape) > 0.4
    mask[0], mask[:, shape[1] // 2] = False, True
    return mask


def plain(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    joint_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula for one sample after another, on its real tokens and slots alone, in whatever precision they have."""
    B, H, K, E = queries.shape
    N = keys.shape[2]
    updates, attention = queries.new_zeros(B, H, K, values.shape[-1]), queries.new_zeros(B, H, K, N)
    for b in range(B):
        tokens = torch.arange(N) if mask is None else mask[b].nonzero().flatten()
        slots = torch.arange(K) if slot_mask is None else slot_mask[b].nonzero().flatten()
        own = [h if keys.shape[1] > 1 else 0 for h in range(H)]
        logits = torch.stack([queries[b, h, slots] @ keys[b, own[h]][tokens].T / E**0.5 for h in range(H)])
        logits = logits if bias is None else logits + bias[b][:, slots, None]
        soft = logits.flatten(0, 1).softmax(0).view(logits.shape) if joint_heads else logits.softmax(1)
        mean = (soft + 1e-8) / (soft + 1e-8).sum(-1, keepdim=True)
        for h in range(H):
            updates[b, h, slots] = mean[h] @ values[b, own[h]][tokens]
            attention[b, h, slots[:, None], tokens] = soft[h]
    return updates, attention


def outputs_and_gradients(function: Any, inputs: Inputs) -> list[Tensor]:
    """Updates and attention, and the gradients of all inputs for a projection of both."""
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    updates, attention = function(**inputs)
    total = torch.cat([updates.flatten(), attention.flatten()]).double()
    return [updates.detach(), attention.detach(), *gradients(total, *inputs.values())]


def of_real_slots(results: list[Tensor], slot_mask: Tensor | None) -> list[Tensor]:
    """The results with 0 in place of what masked slots have read, which has no meaning."""
    if slot_mask is None:
        return results
    return [results[0] * slot_mask[:, None, :, None], *results[1:]]


@every_implementation
@pytest.mark.parametrize("joint_heads", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_are_lines_7_and_8_of_algorithm_1(impl: str, joint_heads: bool, shared: bool, masked: bool) -> None:
    inputs = draw(G=1 if shared else 2)
    masks = {"mask": ragged(2, 9), "slot_mask": ragged(2, 4)} if masked else {}
    ours = slot_attention(**inputs, **masks, joint_heads=joint_heads, impl=impl)
    expected = plain(**inputs, **masks, joint_heads=joint_heads)
    for value, wanted in zip(of_real_slots(list(ours), masks.get("slot_mask")), expected, strict=True):
        assert_close(value, wanted, 1e-10)


@every_implementation
@pytest.mark.parametrize("joint_heads", [False, True])
def test_gradcheck(impl: str, joint_heads: bool) -> None:
    inputs = draw(N=5, K=2)
    masks = {"mask": ragged(2, 5), "slot_mask": ragged(2, 2)}

    def function(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(slot_attention(queries, keys, values, **masks, bias=bias, joint_heads=joint_heads, impl=impl))

    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("heads", [1, 3])
def test_one_gradient_where_values_are_the_keys(heads: int) -> None:
    inputs = draw(H=heads, G=1)
    queries, keys = inputs["queries"].requires_grad_(), inputs["keys"].requires_grad_()
    mask = ragged(2, 9)
    results = []
    for values in (keys, keys.clone()):
        output = slot_attention(queries, keys, values, mask, joint_heads=True, impl="mixed")
        results.append(gradients(torch.cat([part.flatten() for part in output]), queries, keys))
    for one, two in zip(*results, strict=True):
        assert_close(one, two, 1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    H=st.sampled_from([1, 2, 3]),
    N=st.sampled_from([1, 2, 7, 16, 31, 64]),
    K=st.sampled_from([1, 2, 7, 9]),
    E=st.sampled_from([1, 5, 8]),
    V=st.sampled_from([1, 4, 13]),
    shared=st.booleans(),
    joint_heads=st.booleans(),
    masked=st.booleans(),
    absent=st.booleans(),
    biased=st.booleans(),
    strided=st.booleans(),
)
def test_mixed_equals_reference(
    B: int,
    H: int,
    N: int,
    K: int,
    E: int,
    V: int,
    shared: bool,
    joint_heads: bool,
    masked: bool,
    absent: bool,
    biased: bool,
    strided: bool,
) -> None:
    torch.manual_seed(N * E * K * V)
    inputs = draw(B, H, 1 if shared else H, K, N, E, V)
    if not biased:
        del inputs["bias"]
    if strided:
        inputs = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs.items()}
    masks = {"mask": torch.rand(B, N) > 0.5} if masked else {}
    masks |= {"slot_mask": torch.rand(B, K) > 0.5} if absent else {}
    both = (
        outputs_and_gradients(partial(slot_attention, **masks, joint_heads=joint_heads, impl=impl), inputs)
        for impl in ("reference", "mixed")
    )
    for value, expected in zip(*both, strict=True):
        assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("joint_heads", [False, True])
def test_mixed_is_no_less_exact_than_the_plain_formula(dtype: torch.dtype, joint_heads: bool) -> None:
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        low = {name: value.to(dtype) for name, value in draw(N=63, K=5, E=16, V=16).items()}
        masks = {"mask": ragged(2, 63) if seed % 2 else None, "joint_heads": joint_heads}
        exact = outputs_and_gradients(partial(plain, **masks), {name: value.double() for name, value in low.items()})
        fast = outputs_and_gradients(partial(slot_attention, **masks, impl="mixed"), low)
        draws.append((fast, outputs_and_gradients(partial(plain, **masks), low), exact))
    assert_within_budget_on_average(draws)


@every_implementation
def test_results_are_float32_or_better(impl: str) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        inputs = {name: value.to(dtype) for name, value in draw().items()}
        assert {value.dtype for value in slot_attention(**inputs, impl=impl)} == {expected}


@every_implementation
def test_heads_may_share_their_tokens(impl: str) -> None:
    inputs = draw(G=1)
    copied = {
        name: value.expand(-1, 2, -1, -1) if name in ("keys", "values") else value for name, value in inputs.items()
    }
    for one, other in zip(slot_attention(**inputs, impl=impl), slot_attention(**copied, impl=impl), strict=True):
        assert_close(one, other, 1e-12)


@every_implementation
@pytest.mark.parametrize("empty", ["all masked", "no tokens"])
def test_slots_of_a_sample_without_tokens_read_zeros(impl: str, empty: str) -> None:
    inputs, mask = draw(), torch.zeros(2, 9, dtype=torch.bool)
    if empty == "no tokens":
        inputs, mask = {**inputs, "keys": inputs["keys"][:, :, :0], "values": inputs["values"][:, :, :0]}, None
    results = outputs_and_gradients(partial(slot_attention, mask=mask, impl=impl), inputs)
    assert not results[0].any()
    assert all(torch.isfinite(result).all() for result in results)


@every_implementation
def test_a_slot_that_is_not_there_takes_nothing(impl: str) -> None:
    inputs, slot_mask = draw(), torch.tensor([[True, True, False, True], [False] * 4])
    results = outputs_and_gradients(partial(slot_attention, slot_mask=slot_mask, impl=impl), inputs)
    assert all(torch.isfinite(result).all() for result in results)
    assert not results[1].transpose(1, 2)[~slot_mask].any()
    assert_close(results[1][0].sum(1), torch.ones(2, 9).double(), 1e-12)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1024, 65536])
def test_no_weight_vanishes_among_many_tokens(impl: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Slot 0 wins one token in a hundred, and of the others a thousandth, which together are a tenth of its mean."""
    won = torch.arange(num_tokens) % 100 == 0
    keys = torch.where(won, 7.0, -7.0)[None, None, :, None]
    values = torch.where(won, 0.0, 8.0)[None, None, :, None]
    inputs = {"queries": torch.tensor([0.5, -0.5])[None, None, :, None], "keys": keys, "values": values}
    exact, _ = plain(**{name: value.double() for name, value in inputs.items()})
    updates, _ = slot_attention(**{name: value.to(dtype) for name, value in inputs.items()}, impl=impl)
    in_float32, _ = plain(**inputs)
    allowed = 4 * torch.finfo(dtype).eps * exact.abs().max() + 2 * (in_float32 - exact).abs().max()
    assert (updates - exact).abs().max() <= allowed
    assert updates[0, 0, 0].item() > 0.5


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_over_many_tokens_do_not_overflow(impl: str, dtype: torch.dtype) -> None:
    inputs = {name: value.to(dtype) for name, value in draw(B=1, N=32768, K=2).items()}
    inputs["values"] = torch.full_like(inputs["values"], 1000)
    results = outputs_and_gradients(partial(slot_attention, impl=impl), inputs)
    assert all(torch.isfinite(result).all() for result in results)
    rounding = 2 * torch.finfo(dtype).eps + 32768**0.5 * torch.finfo(torch.float32).eps  # of the result, of the sums
    assert_close(results[0].double() / 1000, torch.ones_like(results[0]).double(), rounding)


@every_implementation
@pytest.mark.parametrize("normalization", ["slots", "tokens"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_tokens_read_of_slots(impl: str, normalization: str, masked: bool) -> None:
    B, N, K = 2, 9, 4
    queries, keys, values = (torch.randn(B, R, 3, dtype=torch.float64, requires_grad=True) for R in (N, K, K))
    mask, slot_mask = (ragged(B, N), ragged(B, K)) if masked else (None, None)

    def function(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return read_slots(queries, keys, values, mask, slot_mask, normalization=normalization, impl=impl)

    ours = function(queries, keys, values)
    for b in range(B):
        tokens = torch.arange(N) if mask is None else mask[b].nonzero().flatten()
        slots = torch.arange(K) if slot_mask is None else slot_mask[b].nonzero().flatten()
        weights = (queries[b, tokens] @ keys[b, slots].T / 3**0.5).softmax(1)
        if normalization == "tokens":
            weights = (weights + 1e-8) / (weights + 1e-8).sum(0)
        assert_close(ours[b, tokens], weights @ values[b, slots], 1e-10)
    assert torch.autograd.gradcheck(function, (queries, keys, values))


@pytest.mark.compiled  # jaxtyping would speak first
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 4, 3)}, r"queries: expected shape \[B, H, K, E\], got shape \(2, 4, 3\)"),
        ({"keys": torch.zeros(2, 2, 9, 4)}, r"keys: expected shape \[B, H, N, E\] with D = 3, got shape"),
        ({"keys": torch.zeros(2, 2, 9, 3).long()}, "keys: expected a floating-point tensor"),
        ({"values": torch.zeros(2, 2, 8, 5)}, "keys and values: expected B = 2, and H = 2 or 1, in both, got"),
        ({"mask": torch.ones(2, 9)}, r"mask: expected a boolean tensor.*Use mask.bool\(\)"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask: expected shape \[B, N\] = \(2, 9\), got shape \(2, 8\)"),
        ({"slot_mask": torch.ones(2, 9, dtype=torch.bool)}, r"slot_mask: expected shape \[B, K\] = \(2, 4\), got"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"impl": "fast"}, r"impl: expected one of \('auto', 'reference', 'mixed', 'triton'\), got 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        slot_attention(**{**draw(), **change})


# Dtype of tokens, slots of all heads, softmaxes: of what `Tiling.of` may choose, what needs most registers.
TILINGS = [("bf16", 16, 1), ("fp16", 64, 4), ("fp32", 64, 4)]
STRIDES = {"stride_b", "stride_n", "stride", "made_stride", "summed_stride"}
INTEGERS = {*"NDHKBWSEMU", "rows", "chunk", "chunks", "token_chunks", "blocks", "tiles", "reads", "graded"} | STRIDES
FLOATS = {"eps", "scale", "token_scale", "mlp_eps", "slot_eps", "read_eps", "norm_eps"}
MULTIPLES_OF_16 = {*"DWSEMU", "chunk"} | STRIDES


def check_registers(kernel: Any, low: str, in_float32: str, constants: dict[str, Any]) -> None:
    """It spills nothing where pointers lead to numbers of type `low`, or float32 for those named in `in_float32`."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    types = {name: f"*{low}" for name in kernel.arg_names if name not in constants}
    types |= {name: "*fp32" for name in in_float32.split() if name in types}
    types |= {name: "*i1" for name in ("mask", "slot_mask") if name in types}
    types |= dict.fromkeys(INTEGERS & {*types}, "i32") | dict.fromkeys(FLOATS & {*types}, "fp32")
    for chip in CHIPS:
        usage = compile_for(chip, kernel, types, constants, multiples_of_16=MULTIPLES_OF_16, **options)
        # To fit another program into the chip, ptxas may put a few bytes away where half of the registers are free.
        allowed = 16 if usage.registers <= 128 and "maxnreg" not in options else 0
        assert usage.spilled <= allowed, (kernel.__name__, chip, usage)


@pytest.mark.compiled  # Shape checks would wrap what Triton reads the source of.
@pytest.mark.parametrize(("dtype", "rows", "softmaxes"), TILINGS, ids=str)
def test_kernels_that_read_fit_into_registers(dtype: str, rows: int, softmaxes: int) -> None:
    triton = pytest.importorskip("narrows.ops.slot_attention.triton")
    of_torch = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tiling = triton.Tiling.of(softmaxes, rows // softmaxes, 1024, of_torch, False)
    assert (tiling.rows, tiling.softmaxes) == (rows, softmaxes)
    wide = "bias sums totals attention centres grad_attention grad_readers grad_bias"
    for kernel in (triton._read_backward_rows, triton._read_backward_tokens):
        check_registers(kernel, dtype, wide, tiling.constants())
    for whole in (False, True) if rows == 16 else (False,):
        check_registers(triton._read, dtype, wide, {**tiling.constants(), "WHOLE": whole})


# What the two-way form has besides.
TWO_WAY = {"token_readers", "token_bias", "token_gates", "token_parts", "token_part_bias", "of_token_gates", "gate"}
TWO_WAY |= {"last_input", "last_state", "last_input_bias", "last_state_bias"}
TWO_WAY |= {f"read_{name}" for name in ("gain", "shift", "key", "key_bias", "value", "value_bias")}
TWO_WAY |= {f"token_{name}" for name in ("gain", "shift", "query", "query_bias")}


@pytest.mark.compiled
@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize(("low", "own"), [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")], ids=str)
def test_kernels_that_update_fit_into_registers(low: str, own: str, two_way: bool) -> None:
    """Products in `low`, slots and parameters in `own`: under autocast they differ."""
    update = pytest.importorskip("narrows.ops.slot_attention.update")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[low]
    wide = "sums totals means total bias cells parts part_bias carry scratch summed_before summed_now norm_before "
    wide += "norm_now centres token_bias token_parts token_part_bias"
    for kernel in (update._forward, update._backward):
        if own == "fp32":
            wide += f" slots new {' '.join(Weights._fields)}{' before' * (kernel is update._backward)}"
            wide += " gate" + "".join(f" {name}" for name in TWO_WAY if name.startswith(("read_", "token_q")))
        absent = {} if two_way else dict.fromkeys(TWO_WAY & {*kernel.arg_names})
        check_registers(kernel, low, wide, {**update.tiling(dtype), "HAS_READ": True, "READS_ON": True, **absent})


@pytest.mark.compiled
@pytest.mark.parametrize("over_tokens", [False, True])
@pytest.mark.parametrize(("low", "slots"), [("bf16", 16), ("fp16", 64), ("fp32", 16), ("fp32", 64)], ids=str)
def test_kernels_of_tokens_that_read_slots_fit_into_registers(low: str, slots: int, over_tokens: bool) -> None:
    kernels = pytest.importorskip("narrows.ops.slot_attention.token_kernels")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[low]
    absent = {} if over_tokens else {"parts": None, "totals": None}
    for kernel, more in ((kernels._forward, {"READS_ON": True}), (kernels._backward, {})):
        constants = {**kernels.tiling(slots, dtype, backward=kernel is kernels._backward), **more}
        constants |= {name: value for name, value in absent.items() if name in kernel.arg_names}
        check_registers(kernel, low, "bias parts totals of_read centres sums", constants)
