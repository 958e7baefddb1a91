"""Slot attention: the reference against loops, the fast form against the reference, masks, precision, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import NarrowsError
from narrows.ops.slot_attention import GRU, MLP, Affine, SlotAttentionWeights, slot_attention
from tests.support import assert_close, assert_within_budget_on_average, gradients

FORMS = {  # heads, joint_heads, output map, biases
    "one head": (1, False, False, False),
    "biases": (1, False, False, True),
    "heads": (2, False, False, False),
    "heads and output": (2, False, True, True),
    "joint heads": (3, True, True, False),
}


def affine(out: int, width: int, bias: bool = True) -> Affine:
    return Affine(torch.randn(out, width) * width**-0.5, torch.randn(out) * 0.3 if bias else None)


def norm(width: int) -> Affine:
    return Affine(1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width))


def make_weights(D: int, S: int, form: str, *, E: int = 3, M: int = 7) -> SlotAttentionWeights:
    heads, _, output, bias = FORMS[form]
    read = heads * E
    return SlotAttentionWeights(
        norm_tokens=norm(D),
        norm_slots=norm(S),
        query=affine(read, S, bias),
        key=affine(read, D, bias),
        value=affine(read, D, bias),
        output=affine(S, read, bias) if output else None,
        gru=GRU(affine(3 * S, S if output else read), affine(3 * S, S)),
        mlp=MLP(norm(S), affine(M, S), affine(S, M)),
    )


def tree(function: Any, weights: Any) -> Any:
    """The weights with `function` applied to every tensor."""
    if weights is None or isinstance(weights, Tensor):
        return None if weights is None else function(weights)
    if type(weights) is tuple:
        return tuple(tree(function, weight) for weight in weights)
    return type(weights)(*(tree(function, weight) for weight in weights))


def leaves(weights: Any) -> list[Tensor]:
    if weights is None or isinstance(weights, Tensor):
        return [] if weights is None else [weights]
    return [leaf for weight in weights for leaf in leaves(weight)]


def options(form: str, **others: Any) -> dict[str, Any]:
    return {"heads": FORMS[form][0], "joint_heads": FORMS[form][1], **others}


def plain(
    tokens: Tensor, slots: Tensor, weights: SlotAttentionWeights, mask: Tensor | None, form: str, T: int = 3
) -> tuple[Tensor, Tensor]:
    """The textbook formula for one sample after another, on its real tokens alone, in whatever precision they have."""
    H, joint, _, _ = FORMS[form]

    def linear(x: Tensor, map: Affine) -> Tensor:
        return x @ map.weight.T if map.bias is None else x @ map.weight.T + map.bias

    def normalize(x: Tensor, map: Affine) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * map.weight + map.bias

    all_slots, all_attention = [], []
    for b in range(len(tokens)):
        keep = torch.ones(tokens.shape[1], dtype=torch.bool) if mask is None else mask[b]
        x, s = normalize(tokens[b, keep], weights.norm_tokens), slots[b]
        k, v = linear(x, weights.key).chunk(H, -1), linear(x, weights.value).chunk(H, -1)
        for _ in range(T):
            q = linear(normalize(s, weights.norm_slots), weights.query).chunk(H, -1)
            logits = torch.stack([q[h] @ k[h].T / q[h].shape[-1] ** 0.5 for h in range(H)])
            shape = logits.shape
            attention = logits.flatten(0, 1).softmax(0).view(shape) if joint else logits.softmax(1)
            mean = (attention + 1e-8) / (attention + 1e-8).sum(-1, keepdim=True)
            u = torch.cat([mean[h] @ v[h] for h in range(H)], -1)
            u = u if weights.output is None else linear(u, weights.output)
            i_r, i_z, i_n = linear(u, weights.gru.input).chunk(3, -1)
            h_r, h_z, h_n = linear(s, weights.gru.hidden).chunk(3, -1)
            new, z = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n), torch.sigmoid(i_z + h_z)
            s = (1 - z) * new + z * s
            s = s + linear(linear(normalize(s, weights.mlp.norm), weights.mlp.expand).relu(), weights.mlp.contract)
        full = torch.zeros(*attention.shape[:2], tokens.shape[1], dtype=s.dtype)
        full[..., keep] = attention
        all_slots.append(s)
        all_attention.append(full)
    return torch.stack(all_slots), torch.stack(all_attention)


def draw(form: str = "one head", B: int = 2, N: int = 9, D: int = 6, K: int = 4, S: int = 5) -> tuple[Any, ...]:
    """Tokens, slots and weights in float64."""
    weights = tree(Tensor.double, make_weights(D, S, form))
    return torch.randn(B, N, D).double(), torch.randn(B, K, S).double(), weights


def ragged(B: int, N: int) -> Tensor:
    """A mask with holes; the first sample has one token only."""
    mask = torch.rand(B, N) > 0.4
    mask[0], mask[:, N // 2] = False, True
    return mask


def outputs_and_gradients(function: Any, tokens: Tensor, slots: Tensor, weights: Any) -> list[Tensor]:
    """Slots, attention, and the gradients of tokens, slots and all weights, for a projection of the first two."""
    tokens, slots = tokens.detach().requires_grad_(), slots.detach().requires_grad_()
    weights = tree(lambda w: w.detach().requires_grad_(), weights)
    out, attention = function(tokens, slots, weights)
    inputs = [tokens, slots, *leaves(weights)]
    both = torch.cat([out.flatten(), attention.flatten()]).double()
    of_tokens, of_slots, *of_weights = gradients(both, *inputs)
    of_weights = torch.cat([gradient.flatten() for gradient in of_weights])
    return [out.detach(), attention.detach(), of_tokens, of_slots, of_weights]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_algorithm_1(form: str, masked: bool) -> None:
    tokens, slots, weights = draw(form)
    mask = ragged(2, 9) if masked else None
    ours = slot_attention(tokens, slots, weights, mask, impl="reference", **options(form))
    theirs = plain(tokens, slots, weights, mask, form)
    assert_close(ours.slots, theirs[0], 1e-10)
    assert_close(ours.attention, theirs[1], 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("form", ["heads and output", "joint heads"])
def test_gradcheck(impl: str, form: str) -> None:
    tokens, slots, weights = draw(form, B=2, N=5, D=3, K=2, S=3)
    tokens, slots, weights = tree(Tensor.requires_grad_, (tokens, slots, weights))
    mask = ragged(2, 5)

    def function(tokens: Tensor, slots: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(slot_attention(tokens, slots, weights, mask, num_iterations=2, impl=impl, **options(form)))

    assert torch.autograd.gradcheck(function, (tokens, slots, *leaves(weights)))


def test_absorbed_is_twice_differentiable() -> None:
    tokens, slots, weights = draw("joint heads", B=1, N=4, D=3, K=2, S=2)

    def function(tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        form = options("joint heads", num_iterations=2)
        return tuple(slot_attention(tokens, slots, weights, ragged(1, 4), impl="absorbed", **form))

    assert torch.autograd.gradgradcheck(function, (tokens.requires_grad_(), slots.requires_grad_()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    B=st.integers(1, 3),
    N=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 64]),
    D=st.sampled_from([1, 5, 8, 17]),
    K=st.sampled_from([1, 2, 3, 7, 9]),
    S=st.sampled_from([1, 4, 13]),
    masked=st.booleans(),
    strided=st.booleans(),
    T=st.integers(1, 4),
)
def test_absorbed_equals_reference(
    form: str, B: int, N: int, D: int, K: int, S: int, masked: bool, strided: bool, T: int
) -> None:
    torch.manual_seed(N * D * K * S)
    tokens, slots, weights = draw(form, B, N, D, K, S)
    mask = torch.rand(B, N) > 0.5 if masked else None
    if strided:
        tokens, slots = tokens.mT.contiguous().mT, slots.repeat_interleave(2, 1)[:, ::2]

    def run(impl: str) -> list[Tensor]:
        call = options(form, num_iterations=T, impl=impl)
        return outputs_and_gradients(partial(slot_attention, mask=mask, **call), tokens, slots, weights)

    for fast, reference in zip(run("absorbed"), run("reference"), strict=True):
        assert_close(fast, reference, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_absorbed_is_no_less_exact_than_the_plain_formula(dtype: torch.dtype, form: str) -> None:
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        low = tree(lambda x: x.to(dtype), draw(form, B=2, N=63, D=16, K=5, S=12))
        mask = ragged(2, 63) if seed % 2 else None
        fast = partial(slot_attention, mask=mask, impl="absorbed", **options(form))
        textbook = partial(plain, mask=mask, form=form)
        exact = outputs_and_gradients(textbook, *tree(Tensor.double, low))
        draws.append((outputs_and_gradients(fast, *low), outputs_and_gradients(textbook, *low), exact))
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_a_mask_is_a_truncation_and_hides_even_nan(impl: str) -> None:
    tokens, slots, weights = draw("heads")
    call = options("heads", impl=impl)
    alone = outputs_and_gradients(partial(slot_attention, **call), tokens[:, :6], slots, weights)
    tokens[:, 6:] = torch.nan
    mask = (torch.arange(9) < 6).expand(2, 9)
    padded = outputs_and_gradients(partial(slot_attention, mask=mask, **call), tokens, slots, weights)
    assert_close(padded[0], alone[0], 1e-10)
    assert torch.equal(padded[1][..., 6:], torch.zeros(2, 2, 4, 3))
    attention = slot_attention(tokens[:, :6], slots, weights, **call).attention
    assert_close(padded[1][..., :6], attention, 1e-10)
    assert all(torch.isfinite(gradient).all() for gradient in padded[2:])
    assert padded[2][:, 6:].abs().max() == 0


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("empty", ["all masked", "no tokens"])
def test_slots_of_a_sample_without_tokens_have_read_zeros(impl: str, empty: str) -> None:
    tokens, slots, weights = draw("biases")
    mask = torch.zeros(2, 9, dtype=torch.bool)
    if empty == "no tokens":
        tokens, mask = tokens[:, :0], None
    results = outputs_and_gradients(partial(slot_attention, mask=mask, impl=impl), tokens, slots, weights)
    blind = weights._replace(value=tree(torch.zeros_like, weights.value))
    assert_close(results[0], slot_attention(torch.zeros(2, 1, 6).double(), slots, blind).slots, 1e-10)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_order_of_tokens_and_of_slots(impl: str) -> None:
    tokens, slots, weights = draw("joint heads")
    call = options("joint heads", impl=impl)
    expected = slot_attention(tokens, slots, weights, **call)
    of_tokens, of_slots = torch.randperm(9), torch.randperm(4)
    moved = slot_attention(tokens[:, of_tokens], slots[:, of_slots], weights, **call)
    assert_close(moved.slots, expected.slots[:, of_slots], 1e-10)
    assert_close(moved.attention, expected.attention[:, :, of_slots][..., of_tokens], 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_slot_that_wins_nothing_stays_finite_where_eps_underflows(impl: str, dtype: torch.dtype) -> None:
    """Upstream adds 1e-8 in float16, where it is 0: such a slot divides 0 by 0."""
    tokens, slots, weights = draw()
    key = Affine(torch.zeros_like(weights.key.weight), 1000 * torch.ones(3).double())
    query = Affine(torch.zeros_like(weights.query.weight), None)
    query.weight[:, 0] = 100  # the slot with the largest first channel takes every token
    low = tree(lambda x: x.to(dtype), (tokens, slots, weights._replace(key=key, query=query)))
    results = outputs_and_gradients(partial(slot_attention, num_iterations=1, impl=impl), *low)
    assert results[1].amin() == 0
    assert all(torch.isfinite(result).all() for result in results)
    oracle, _ = slot_attention(*tree(Tensor.double, low), num_iterations=1, impl="reference")
    assert_close(results[0], oracle, 8 * torch.finfo(dtype).eps)


def test_auto_absorbs_while_it_pays() -> None:
    tokens, slots, weights = draw(N=50, D=12)
    tokens, slots, weights = tree(Tensor.float, (tokens, slots, weights))

    def same(impl: str, T: int, dtype: torch.dtype) -> bool:
        inputs = tree(lambda x: x.to(dtype), (tokens, slots, weights))
        auto, named = (slot_attention(*inputs, num_iterations=T, impl=i).attention for i in ("auto", impl))
        return torch.equal(auto, named)

    assert same("absorbed", 3, torch.float32)  # T*K*H = 12 = D
    assert not same("reference", 3, torch.float32)
    assert same("reference", 4, torch.float32)
    assert not same("absorbed", 4, torch.float32)
    assert same("absorbed", 4, torch.bfloat16)


@pytest.mark.compiled  # jaxtyping would speak first
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 9, 7)}, r"tokens: expected shape \[B, N, D\] with D = 6, got shape \(2, 9, 7\)"),
        ({"tokens": torch.zeros(2, 9, 6, dtype=torch.long)}, "tokens: expected a floating-point tensor"),
        ({"slots": torch.zeros(2, 4, 6)}, r"slots: expected shape \[B, K, S\] with D = 5, got shape \(2, 4, 6\)"),
        ({"slots": torch.zeros(1, 4, 5)}, "slots: expected as many samples as tokens, 2, got 1"),
        ({"mask": torch.ones(2, 9)}, r"mask: expected a boolean tensor.*Use mask.bool\(\)"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask: expected shape \[B, N\] = \(2, 9\), got shape \(2, 8\)"),
        ({"num_iterations": 0}, "num_iterations: expected a positive integer, got 0"),
        ({"heads": 2}, "heads: expected a divisor of 3, got 2"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"impl": "fast"}, r"impl: expected 'auto' or one of \['absorbed', 'reference'\], got 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages(change: dict[str, Any], message: str) -> None:
    call = {"tokens": torch.zeros(2, 9, 6), "slots": torch.zeros(2, 4, 5), **change}
    with pytest.raises(NarrowsError, match=message):
        slot_attention(weights=make_weights(6, 5, "one head"), **call)
