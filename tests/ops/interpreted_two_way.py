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
from narrows.ops.slot_attention import slot_update, token_update
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
    N=st.sampled_from([1, 5, 17]),
    D=st.sampled_from([1, 16, 20]),
    K=st.sampled_from([1, 3, 17]),
    S=st.sampled_from([3, 16]),
    M=st.sampled_from([1, 2, 18]),
    bias=st.booleans(),
    masked=st.sampled_from(["no", "some", "all"]),
    absent=st.booleans(),
    strided=st.booleans(),
    per=st.sampled_from(["slots", "tokens"]),
)
def test_outputs_and_gradients(
    B: int, N: int, D: int, K: int, S: int, M: int, bias: bool, masked: str, absent: bool, strided: bool, per: str
) -> None:
    torch.manual_seed(N * D * K * S)
    M = min(M, 2 * D)
    layer = away_from_the_kink(make(D, K, S, M, T=1, token_normalization=per, qkv_bias=bias))
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


def test_more_tokens_than_a_tile_and_wider_than_a_block() -> None:
    layer = away_from_the_kink(make(D=36, K=3, S=34, M=40, T=1, qkv_bias=True))
    tokens, slots = torch.randn(1, 130, 36, dtype=torch.float64), torch.randn(1, 3, 34, dtype=torch.float64)
    exact = outputs_and_gradients(layer, called(layer, "reference", None), tokens, slots)
    layer = layer.float()
    fast = outputs_and_gradients(layer, called(layer, "triton", None), tokens.float(), slots.float())
    for value, expected in zip(fast, exact, strict=True):
        assert_close(value, expected, 1e-4)


@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_measure_counts_what_the_plain_form_multiplies(per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights over the tokens, tokens are read once more for their sums: two products with all tokens."""
    layer = make(D=6, K=2, S=4, M=8, T=2, qkv_bias=True, token_normalization=per).float()
    function, inputs = called(layer, "triton", None), (torch.randn(3, 5, 6), torch.randn(3, 2, 4))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels = count_macs(lambda: function(*inputs))
        for module in (slot_update, token_update):
            monkeypatch.setattr(module, "is_transformed", lambda *_: True)
        assert kernels - count_macs(lambda: function(*inputs)) == (per == "tokens") * 2 * 2 * 3 * 2 * 5 * 6


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


def test_transformations_take_plain_operations() -> None:
    layer = make(D=6, K=2, S=4, M=8, T=1, qkv_bias=True).float()
    tokens, slots = torch.randn(1, 5, 6), torch.randn(1, 2, 4)
    results = []
    for impl in ("triton", "reference"):
        function = called(layer, impl, None)
        results.append(torch.func.jvp(lambda x: function(x, slots), (tokens,), (torch.ones_like(tokens),))[1])  # noqa: B023
    for value, expected in zip(*results, strict=True):
        assert_close(value, expected, 1e-4)


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"num_slots": 65}, torch.randn(1, 5, 8), "it takes 64 slots"),
        ({"num_slots": 3, "mlp_dim": 24}, torch.randn(1, 5, 8), "wider than twice the tokens"),
        ({"num_slots": 3, "mlp_dim": 8, "dtype": torch.float64}, torch.randn(1, 5, 8).double(), "float64"),
    ],
    ids=["slots", "mlp", "float64"],
)
def test_what_kernels_cannot_take_is_an_error_by_name(options: dict[str, object], tokens: Tensor, reason: str) -> None:
    layer = TwoWaySlotAttention(8, **{"mlp_dim": 8, **options}, impl="triton")
    with pytest.raises(ImplementationUnavailable, match=f"impl='triton' cannot run here: .*{reason}"):
        layer(tokens)
