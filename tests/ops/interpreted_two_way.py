"""The kernels of two-way slot attention against its formula, by Triton's interpreter: see `tests/kernels.py`."""

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.costs import count_macs
from narrows.errors import ImplementationUnavailable
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from narrows.ops.slot_attention import TwoWaySettings, token_kernels, triton, two_way, update
from tests.launches import Launches
from tests.layers.interpreted_slot_attention import READS, Counted
from tests.layers.test_two_way_slot_attention import away_from_the_kink, make, outputs_and_gradients, plain
from tests.support import assert_close, assert_within_budget_on_average

assert os.environ.get("TRITON_INTERPRET") == "1", "run me as tests/kernels.py says"


def called(
    layer: TwoWaySlotAttention, impl: str, mask: Tensor | None, slot_mask: Tensor | None = None
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The layer as a function of tokens and slots."""

    def function(tokens: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        layer.impl = impl
        return tuple(layer(tokens, mask, slots, slot_mask=slot_mask, temperature=0.7))

    return function


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    N=st.sampled_from([1, 5, 17, 33]),
    D=st.sampled_from([1, 16, 20]),
    K=st.sampled_from([1, 3, 17]),
    S=st.sampled_from([3, 16]),
    M=st.sampled_from([1, 2, 18]),
    bias=st.booleans(),
    masked=st.sampled_from(["no", "some", "all"]),
    absent=st.booleans(),
    strided=st.booleans(),
    per=st.sampled_from(["slots", "tokens"]),
    T=st.integers(1, 2),
)
def test_outputs_and_gradients(
    B: int,
    N: int,
    D: int,
    K: int,
    S: int,
    M: int,
    bias: bool,
    masked: str,
    absent: bool,
    strided: bool,
    per: str,
    T: int,
) -> None:
    torch.manual_seed(N * D * K * S)
    layer = away_from_the_kink(make(D, K, S, M, T=T, token_normalization=per, qkv_bias=bias))
    tokens, slots = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, K, S, dtype=torch.float64)
    if strided:
        tokens, slots = tokens.mT.contiguous().mT, slots.repeat_interleave(2, 1)[:, ::2]
    mask = None if masked == "no" else torch.rand(B, N) > 0.5
    if masked == "all":
        mask[0] = False
    slot_mask = torch.rand(B, K) > 0.4 if absent else None
    if mask is not None:
        tokens = tokens.masked_fill(~mask[..., None], torch.nan)
    exact = outputs_and_gradients(layer, called(layer, "reference", mask, slot_mask), tokens, slots)
    layer = deepcopy(layer).float()
    fast = outputs_and_gradients(layer, called(layer, "triton", mask, slot_mask), tokens.float(), slots.float())
    for value, expected in zip(fast, exact, strict=True):
        assert_close(value, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_no_less_exact_than_the_plain_formula(dtype: torch.dtype, per: str) -> None:
    draws = []
    for seed in range(2):
        torch.manual_seed(seed)
        low = away_from_the_kink(make(D=16, K=5, S=12, M=16, qkv_bias=True, token_normalization=per)).to(dtype)
        tokens, slots = torch.randn(1, 20, 16).to(dtype), torch.randn(1, 5, 12).to(dtype)
        mask = torch.rand(1, 20) > 0.3 if seed % 2 else None
        exact = deepcopy(low).double()
        formula = partial(plain, mask=mask, temperature=0.7)
        draws.append(
            (
                outputs_and_gradients(low, called(low, "triton", mask), tokens, slots),
                outputs_and_gradients(low, partial(formula, low), tokens, slots),
                outputs_and_gradients(exact, partial(formula, exact), tokens.double(), slots.double()),
            )
        )
    assert_within_budget_on_average(draws)


def test_more_tokens_than_a_tile_and_a_chunk_and_wider_than_a_block() -> None:
    layer = away_from_the_kink(make(D=36, K=3, S=66, M=40, T=1, qkv_bias=True))
    tokens, slots = torch.randn(1, 260, 36, dtype=torch.float64), torch.randn(1, 3, 66, dtype=torch.float64)
    exact = outputs_and_gradients(layer, called(layer, "reference", None), tokens, slots)
    layer = layer.float()
    fast = outputs_and_gradients(layer, called(layer, "triton", None), tokens.float(), slots.float())
    for value, expected in zip(fast, exact, strict=True):
        assert_close(value, expected, 1e-4)


@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_launches(per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an iteration one kernel for each side and each read; and one for slots before the first."""
    launched: list[str] = []
    for module, names in (
        (update, ("_forward", "_backward")),
        (token_kernels, ("_forward", "_backward")),
        (triton, READS),
    ):
        for name in names:
            label = f"tokens{name}" if module is token_kernels else name
            monkeypatch.setattr(module, name, Counted(getattr(module, name), label, launched))
    layer = make(D=6, K=2, S=4, M=8, T=2, token_normalization=per).float()
    outputs = called(layer, "triton", None)(
        torch.randn(1, 5, 6).requires_grad_(), torch.randn(1, 2, 4).requires_grad_()
    )
    sums = ["_read"] * (per == "tokens")
    assert launched == ["_forward", *(["_read", "_forward", *sums, "tokens_forward"] * 2)]
    launched.clear()
    with Launches() as found:
        sum(output.sum() for output in outputs).backward()
    rows, both = "_read_backward_rows", "_read_backward_tokens"
    assert launched == [*(["tokens_backward", rows, "_backward", rows, both] * 2), "_backward"]
    assert found.operations["narrows::two_way_iterations_backward"] == 1
    assert found.operations["mm"] + found.operations["bmm"] == 13  # the matrices that multiply slots


def test_nothing_is_kept_without_gradients_and_no_token_is_a_token_too_few() -> None:
    layer = make(D=6, K=2, S=4, M=8, T=2, qkv_bias=True).float()
    function, (tokens, slots) = called(layer, "triton", None), (torch.randn(2, 5, 6), torch.randn(2, 2, 4))
    kept = function(tokens, slots)
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(function(tokens, slots), kept, strict=True))
    none = outputs_and_gradients(layer, function, tokens[:, :0], slots)
    for value, expected in zip(
        none, outputs_and_gradients(layer, called(layer, "reference", None), tokens[:, :0], slots), strict=True
    ):
        assert_close(value, expected, 1e-4)
    assert [value.shape[0] for value in function(tokens[:0], slots[:0])] == [0] * 3


@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_measure_counts_what_is_multiplied_and_what_backward_makes_anew(per: str) -> None:
    B, N, D, K, S, T = 3, 5, 6, 2, 4, 2
    layer = make(D=D, K=K, S=S, M=8, T=T, qkv_bias=True, token_normalization=per).float()
    tokens, slots = torch.randn(B, N, D).requires_grad_(), torch.randn(B, K, S).requires_grad_()
    settings = TwoWaySettings(T, per == "tokens", 1.0, 1.0, 1e-8, *[1e-5] * 5)
    counts, made = {}, []
    forms = {
        "triton": lambda: made.extend(called(layer, "triton", None)(tokens, slots)),
        "plain": lambda: two_way._plain(tokens, slots, layer._weights(), None, None, settings),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, form in forms.items():
            counts[name] = count_macs(form)
        backward = count_macs(lambda: sum(part.sum() for part in made).backward())
    sums = 2 * N * K * D * (per == "tokens")  # read once more
    assert counts["triton"] - counts["plain"] == T * B * (4 * D * D * (K - N) + 2 * N * K * D + sums)
    anew = 12 * K * N * D + K * (S * D + D * D) + N * 9 * D * D
    assert backward == 2 * counts["triton"] + T * B * (anew - 2 * sums)


def test_twice_differentiable() -> None:
    layer = away_from_the_kink(make(D=6, K=2, S=4, M=8, T=1, qkv_bias=True)).float()
    inputs, second = (torch.randn(1, 5, 6), torch.randn(1, 2, 4)), []
    for impl in ("triton", "reference"):
        leaves = [value.clone().requires_grad_() for value in inputs]
        together = torch.cat([part.flatten() for part in called(layer, impl, None)(*leaves)])
        first = torch.autograd.grad(together, leaves, torch.linspace(-1, 1, together.numel()), create_graph=True)
        second.append(torch.autograd.grad(sum((grad * grad).sum() for grad in first), leaves))
    for value, expected in zip(*second, strict=True):
        assert_close(value, expected, 1e-3)


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"num_slots": 65}, torch.randn(1, 5, 8), "it takes 64 slots"),
        ({"num_slots": 3, "mlp_dim": 1025}, torch.randn(1, 5, 8), "MLPs 1024 wide at most, not 1025"),
        ({"num_slots": 3, "dtype": torch.float64}, torch.randn(1, 5, 8).double(), "float64"),
    ],
    ids=["slots", "mlp", "float64"],
)
def test_what_kernels_cannot_take_is_an_error_by_name(options: dict[str, object], tokens: Tensor, reason: str) -> None:
    layer = TwoWaySlotAttention(8, **options, impl="triton")
    with pytest.raises(ImplementationUnavailable, match=f"impl='triton' cannot run here: .*{reason}"):
        layer(tokens)


def test_what_else_kernels_cannot_take() -> None:
    layer, tokens, slots = (
        TwoWaySlotAttention(8, num_slots=2, impl="triton"),
        torch.randn(1, 5, 8),
        torch.zeros(1, 2, 8),
    )
    with pytest.raises(ImplementationUnavailable, match="it has no rule for"):
        torch.func.vmap(lambda x: layer(x, slots=slots).slots)(tokens[None])
    layer.tokens_read.norm_readers.eps = 1e-3
    with pytest.raises(ImplementationUnavailable, match="have different eps"):
        layer(tokens)


def test_compiles_to_one_graph_with_gradients() -> None:
    layer = make(D=6, K=2, S=4, M=8, T=1).float()
    function, inputs = called(layer, "triton", None), (torch.randn(1, 5, 6), torch.randn(1, 2, 4))
    expected = outputs_and_gradients(layer, function, *inputs)
    compiled = torch.compile(lambda tokens, slots: function(tokens, slots), fullgraph=True, backend="aot_eager")
    for value, wanted in zip(outputs_and_gradients(layer, compiled, *inputs), expected, strict=True):
        assert_close(value, wanted)
