"""Two-way slot attention: the reference against loops, the fast form against the reference, masks, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import NarrowsError
from narrows.ops.slot_attention import GRU, MLP, Affine
from narrows.ops.two_way_slot_attention import Exchange, TwoWaySlotAttentionWeights, two_way_slot_attention
from tests.ops.test_slot_attention import affine, leaves, norm, ragged, tree
from tests.support import assert_close, assert_within_budget_on_average, gradients


def make_exchange(R: int, C: int, M: int, bias: bool) -> Exchange:
    return Exchange(
        norm_readers=norm(R),
        norm_read=norm(C),
        query=affine(R, R, bias),
        key=affine(R, C, bias),
        value=affine(R, C, bias),
        gru=GRU(affine(3 * R, R), affine(3 * R, R)),
        mlp=MLP(norm(R), affine(M, R), affine(R, M)),
        mlp_gru=GRU(affine(3 * R, R), affine(3 * R, R)),
    )


def draw(B: int = 2, N: int = 9, D: int = 6, K: int = 4, S: int = 5, M: int = 7, bias: bool = False) -> tuple[Any, ...]:
    """Tokens, slots and weights in float64."""
    weights = TwoWaySlotAttentionWeights(norm(D), make_exchange(S, D, M, bias), make_exchange(D, S, M, bias))
    return tree(Tensor.double, (torch.randn(B, N, D), torch.randn(B, K, S), weights))


def away_from_the_kink(drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs for which no rounding takes a unit across ReLU's kink, where the gradient of any formula jumps."""
    for side in (drawn[2].slots, drawn[2].tokens):
        side.mlp.expand.bias.copy_(6 * side.mlp.expand.bias.sign())
    return drawn


def plain(
    tokens: Tensor, slots: Tensor, weights: TwoWaySlotAttentionWeights, mask: Tensor | None, per: str, T: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample after another, on its real tokens alone, in whatever precision they have."""

    def linear(x: Tensor, map: Affine) -> Tensor:
        return x @ map.weight.T if map.bias is None else x @ map.weight.T + map.bias

    def normalize(x: Tensor, map: Affine) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * map.weight + map.bias

    def gru(u: Tensor, s: Tensor, cell: GRU) -> Tensor:
        (i_r, i_z, i_n), (h_r, h_z, h_n) = linear(u, cell.input).chunk(3, -1), linear(s, cell.hidden).chunk(3, -1)
        z = torch.sigmoid(i_z + h_z)
        return (1 - z) * torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n) + z * s

    def logits_and_values(readers: Tensor, read: Tensor, side: Exchange) -> tuple[Tensor, Tensor]:
        q, read = linear(normalize(readers, side.norm_readers), side.query), normalize(read, side.norm_read)
        return q @ linear(read, side.key).T / q.shape[-1] ** 0.5, linear(read, side.value)

    def update(readers: Tensor, u: Tensor, side: Exchange) -> Tensor:
        readers = gru(u, readers, side.gru)
        hidden = linear(normalize(readers, side.mlp.norm), side.mlp.expand).relu()
        return gru(linear(hidden, side.mlp.contract), readers, side.mlp_gru)

    results = []
    for b in range(len(tokens)):
        keep = torch.ones(tokens.shape[1], dtype=torch.bool) if mask is None else mask[b]
        x, s = normalize(tokens[b, keep], weights.norm_tokens), slots[b]
        for _ in range(T):
            logits, v = logits_and_values(s, x, weights.slots)
            attention = logits.softmax(0)
            s = update(s, (attention + 1e-8) / (attention + 1e-8).sum(1, keepdim=True) @ v, weights.slots)
            logits, v = logits_and_values(x, s, weights.tokens)
            shares = logits.softmax(1)
            shares = shares if per == "slots" else (shares + 1e-8) / (shares + 1e-8).sum(0, keepdim=True)
            x = update(x, shares @ v, weights.tokens)
        full_x, full_a = x.new_zeros(tokens.shape[1:]), x.new_zeros(len(s), tokens.shape[1])
        full_x[keep], full_a[:, keep] = x, attention
        results.append((s, full_x, full_a))
    return tuple(torch.stack(part) for part in zip(*results, strict=True))


def outputs_and_gradients(function: Any, tokens: Tensor, slots: Tensor, weights: Any) -> list[Tensor]:
    """Slots, tokens, attention, and the gradients of tokens, slots and all weights for a projection of the three."""
    tokens, slots, weights = tree(lambda x: x.detach().requires_grad_(), (tokens, slots, weights))
    outputs = function(tokens, slots, weights)
    total = torch.cat([output.flatten() for output in outputs]).double()
    of_tokens, of_slots, *of_weights = gradients(total, tokens, slots, *leaves(weights))
    of_weights = torch.cat([gradient.flatten() for gradient in of_weights])
    return [*(output.detach() for output in outputs), of_tokens, of_slots, of_weights]


@pytest.mark.parametrize("per", ["slots", "tokens"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_the_formula(per: str, masked: bool, bias: bool) -> None:
    inputs, mask = draw(bias=bias), ragged(2, 9) if masked else None
    call = {"num_iterations": 2, "token_normalization": per, "impl": "reference"}
    ours = two_way_slot_attention(*inputs, mask, **call)
    for value, expected in zip(ours, plain(*inputs, mask, per), strict=True):
        assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_gradcheck(impl: str, per: str) -> None:
    tokens, slots, weights = tree(Tensor.requires_grad_, draw(B=2, N=4, D=3, K=2, S=2, M=3))
    mask = ragged(2, 4)

    def function(tokens: Tensor, slots: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        call = {"num_iterations": 1, "token_normalization": per, "impl": impl}
        return tuple(two_way_slot_attention(tokens, slots, weights, mask, **call))

    assert torch.autograd.gradcheck(function, (tokens, slots, *leaves(weights)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    N=st.sampled_from([1, 2, 7, 16, 17, 31]),
    D=st.sampled_from([1, 5, 8, 17]),
    K=st.sampled_from([1, 2, 7, 9]),
    S=st.sampled_from([1, 4, 13]),
    M=st.sampled_from([1, 6, 40]),
    bias=st.booleans(),
    masked=st.booleans(),
    strided=st.booleans(),
    per=st.sampled_from(["slots", "tokens"]),
    T=st.integers(1, 3),
)
def test_absorbed_equals_reference(
    B: int, N: int, D: int, K: int, S: int, M: int, bias: bool, masked: bool, strided: bool, per: str, T: int
) -> None:
    torch.manual_seed(N * D * K * S)
    tokens, slots, weights = draw(B, N, D, K, S, M, bias)
    mask = torch.rand(B, N) > 0.5 if masked else None
    if strided:
        tokens, slots = tokens.mT.contiguous().mT, slots.repeat_interleave(2, 1)[:, ::2]

    def run(impl: str) -> list[Tensor]:
        call = {"mask": mask, "num_iterations": T, "token_normalization": per, "impl": impl}
        return outputs_and_gradients(partial(two_way_slot_attention, **call), tokens, slots, weights)

    for fast, reference in zip(run("absorbed"), run("reference"), strict=True):
        assert_close(fast, reference, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_absorbed_is_no_less_exact_than_the_plain_formula(dtype: torch.dtype, per: str) -> None:
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        low = tree(
            lambda x: x.to(dtype), away_from_the_kink(draw(N=63, D=16, K=5, S=12, M=[16, 40][seed // 4], bias=True))
        )
        mask = ragged(2, 63) if seed % 2 else None
        call = {"mask": mask, "num_iterations": 2, "token_normalization": per, "impl": "absorbed"}
        fast, textbook = partial(two_way_slot_attention, **call), partial(plain, mask=mask, per=per)
        exact = outputs_and_gradients(textbook, *tree(Tensor.double, low))
        draws.append((outputs_and_gradients(fast, *low), outputs_and_gradients(textbook, *low), exact))
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("per", ["slots", "tokens"])
def test_a_mask_is_a_truncation_and_hides_even_nan(impl: str, per: str) -> None:
    tokens, slots, weights = draw()
    call = {"token_normalization": per, "impl": impl}
    expected = two_way_slot_attention(tokens[:, :6], slots, weights, **call)
    tokens[:, 6:] = torch.nan
    mask = (torch.arange(9) < 6).expand(2, 9)
    padded = outputs_and_gradients(partial(two_way_slot_attention, mask=mask, **call), tokens, slots, weights)
    assert_close(padded[0], expected.slots, 1e-10)
    assert_close(padded[1][:, :6], expected.tokens, 1e-10)
    assert_close(padded[2][..., :6], expected.attention, 1e-10)
    assert padded[1][:, 6:].abs().max() == padded[2][..., 6:].abs().max() == padded[3][:, 6:].abs().max() == 0
    assert all(torch.isfinite(gradient).all() for gradient in padded[3:])


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("per", ["slots", "tokens"])
@pytest.mark.parametrize("empty", ["all masked", "no tokens"])
def test_slots_of_a_sample_without_tokens_have_read_zeros(impl: str, per: str, empty: str) -> None:
    tokens, slots, weights = draw(bias=True)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    if empty == "no tokens":
        tokens, mask = tokens[:, :0], None
    function = partial(two_way_slot_attention, mask=mask, token_normalization=per, impl=impl)
    results = outputs_and_gradients(function, tokens, slots, weights)
    value = tree(torch.zeros_like, weights.slots.value)
    blind = weights._replace(slots=weights.slots._replace(value=value))
    assert_close(results[0], two_way_slot_attention(torch.zeros(2, 1, 6).double(), slots, blind).slots, 1e-10)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_order_of_tokens_and_of_slots(impl: str) -> None:
    tokens, slots, weights = draw()
    expected = two_way_slot_attention(tokens, slots, weights, impl=impl)
    of_tokens, of_slots = torch.randperm(9), torch.randperm(4)
    moved = two_way_slot_attention(tokens[:, of_tokens], slots[:, of_slots], weights, impl=impl)
    assert_close(moved.slots, expected.slots[:, of_slots], 1e-10)
    assert_close(moved.tokens, expected.tokens[:, of_tokens], 1e-10)
    assert_close(moved.attention, expected.attention[:, of_slots][..., of_tokens], 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_what_tokens_read_does_not_vanish_with_their_number_as_upstreams_does(impl: str) -> None:
    """Upstream divides by the sum over all tokens: the slots' part in a token's update shrinks as 1/N."""

    def influence(N: int, per: str) -> float:
        torch.manual_seed(0)
        tokens, slots, weights = draw(B=1, N=1, D=16, S=16, K=7)
        tokens = tokens.expand(-1, N, -1)
        blind = weights._replace(tokens=weights.tokens._replace(value=tree(torch.zeros_like, weights.tokens.value)))
        call = {"num_iterations": 1, "token_normalization": per, "impl": impl}
        seeing, unseeing = (two_way_slot_attention(tokens, slots, w, **call).tokens for w in (weights, blind))
        return (seeing - unseeing).norm(dim=-1).mean().item()

    assert influence(1024, "slots") == pytest.approx(influence(16, "slots"), rel=1e-6)
    assert influence(1024, "tokens") < influence(16, "tokens") / 32


@pytest.mark.compiled  # jaxtyping would speak first
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 9, 7)}, r"tokens: expected shape \[B, N, D\] with D = 6, got shape \(2, 9, 7\)"),
        ({"slots": torch.zeros(2, 4, 6)}, r"slots: expected shape \[B, K, S\] with D = 5, got shape \(2, 4, 6\)"),
        ({"slots": torch.zeros(1, 4, 5)}, "slots: expected as many samples as tokens, 2, got 1"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask: expected shape \[B, N\] = \(2, 9\), got shape \(2, 8\)"),
        ({"num_iterations": 0}, "num_iterations: expected a positive integer, got 0"),
        ({"token_normalization": "both"}, r"token_normalization: expected one of \('slots', 'tokens'\), got 'both'"),
        ({"eps": -1.0}, "eps: expected a positive number, got -1.0"),
        ({"impl": "fast"}, r"impl: expected 'auto' or one of \['absorbed', 'reference'\], got 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages(change: dict[str, Any], message: str) -> None:
    _, _, weights = draw()
    call = {"tokens": torch.zeros(2, 9, 6), "slots": torch.zeros(2, 4, 5), **change}
    with pytest.raises(NarrowsError, match=message):
        two_way_slot_attention(weights=weights, **call)
