"""Ragged attention against a loop over queries that looks at one image's keys at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.costs import saved_for_backward
from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType
from narrows.ops.ragged_attention import IMPLEMENTATIONS, ragged_attention
from tests.support import assert_close, assert_within_budget, gradients

IMPLS = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.why_not() is None]
every_impl = pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "varlen"])
SCALE = 0.4
LENGTHS = ([3, 0, 5, 3, 1, 0], [7, 4, 5, 7, 2, 0])


def one_query_at_a_time(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """What each query reads, from the definition, in the precision of the inputs."""
    rows = []
    for image in range(len(queries)):
        own = slice(sum(keys[:image]), sum(keys[: image + 1]))
        for row in query[sum(queries[:image]) : sum(queries[: image + 1])]:
            weights = ((key[own] * row).sum(-1) * SCALE).softmax(0)
            rows.append((weights[..., None] * value[own]).sum(0))
    return torch.stack(rows)


def draw(
    queries: list[int], keys: list[int], heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for lengths in (queries, keys, keys)
    )
    return query, key, value


def counts(*lengths: list[int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(of, dtype=torch.long) for of in lengths)


lengths_of_a_batch = st.lists(
    st.integers(0, 9).flatmap(lambda keys: st.tuples(st.integers(0, min(keys, 3)), st.just(keys))), min_size=1
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(lengths_of_a_batch)
def test_each_query_reads_the_keys_of_its_image(batch: list[tuple[int, int]]) -> None:
    queries, keys = [n for n, _ in batch], [n for _, n in batch]
    inputs = draw(queries, keys)
    for impl in ("reference", "grouped"):
        output = ragged_attention(*inputs, *counts(queries, keys), scale=SCALE, impl=impl)
        if sum(queries) == 0:
            assert output.shape == (0, 2, 8)
            continue
        expected = one_query_at_a_time(*inputs, queries, keys)
        assert_close(output, expected, 1e-12)
        for ours, theirs in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
            assert_close(ours, theirs, 1e-12)


@every_impl
def test_gradients_are_those_of_finite_differences(impl: str) -> None:
    assert torch.autograd.gradcheck(
        lambda *inputs: ragged_attention(*inputs, *counts(*LENGTHS), scale=SCALE, impl=impl), draw(*LENGTHS, width=3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_low_precision_is_as_good_as_the_plain_formula(impl: str, dtype: torch.dtype) -> None:
    low, exact = draw(*LENGTHS, dtype=dtype), draw(*LENGTHS)
    oracle, plain = (one_query_at_a_time(*inputs, *LENGTHS) for inputs in (exact, low))
    fast = ragged_attention(*low, *counts(*LENGTHS), scale=SCALE, impl=impl)
    assert fast.dtype == dtype
    assert_within_budget(fast, plain, oracle)
    results = zip(gradients(fast, *low), gradients(plain, *low), gradients(oracle, *exact), strict=True)
    for ours, theirs, true in results:
        assert_within_budget(ours, theirs, true)


@pytest.mark.gpu
@pytest.mark.skipif("varlen" not in IMPLS, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_for_variable_lengths_is_as_good_as_the_plain_formula(dtype: torch.dtype) -> None:
    low, exact = draw(*LENGTHS, width=64, dtype=dtype), draw(*LENGTHS, width=64)
    oracle, plain = (one_query_at_a_time(*inputs, *LENGTHS) for inputs in (exact, low))
    there = tuple(tokens.detach().cuda().requires_grad_() for tokens in low)
    fast = ragged_attention(*there, *counts(*LENGTHS), scale=SCALE, impl="varlen")
    assert torch.equal(fast, ragged_attention(*there, *counts(*LENGTHS), scale=SCALE))
    assert_within_budget(fast.cpu(), plain, oracle)
    results = zip(gradients(fast, *there), gradients(plain, *low), gradients(oracle, *exact), strict=True)
    for ours, theirs, true in results:
        assert_within_budget(ours.cpu(), theirs, true)


@every_impl
def test_an_image_reads_the_same_whatever_stands_beside_it(impl: str) -> None:
    queries, keys = LENGTHS
    inputs = tuple(tokens.detach() for tokens in draw(queries, keys, dtype=torch.float32))
    together = ragged_attention(*inputs, *counts(queries, keys), scale=SCALE, impl=impl)
    per_image = zip(*(tokens.split(of) for tokens, of in zip(inputs, (queries, keys, keys), strict=True)), strict=True)
    for whole, alone, n, m in zip(together.split(queries), per_image, queries, keys, strict=True):
        assert_close(ragged_attention(*alone, *counts([n], [m]), scale=SCALE, impl=impl), whole, 1e-6)


@every_impl
def test_dropped_weights_are_zero_and_kept_ones_grow(impl: str) -> None:
    query, key, _ = draw([40], [50], heads=1, width=50)
    inputs = query, key, torch.eye(50, dtype=torch.float64)[:, None]  # what is read is the weights
    whole = ragged_attention(*inputs, *counts([40], [50]), scale=SCALE, impl=impl)
    dropped = ragged_attention(*inputs, *counts([40], [50]), scale=SCALE, dropout=0.25, impl=impl)
    kept = dropped != 0
    assert_close(dropped, torch.where(kept, whole / 0.75, 0.0), 1e-12)
    assert 0.70 < kept.double().mean() < 0.80


def test_under_autocast_it_computes_as_fused_attention_does() -> None:
    query, key, value = draw(*LENGTHS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ragged_attention(query, key, value.bfloat16(), *counts(*LENGTHS), scale=SCALE)
    lowered = (tokens.bfloat16() for tokens in (query, key, value))
    assert torch.equal(output, ragged_attention(*lowered, *counts(*LENGTHS), scale=SCALE))


def test_grouped_keeps_no_scores_for_backward() -> None:
    queries, keys = [200, 100], [400, 300]
    inputs = draw(queries, keys, dtype=torch.float32)

    def kept(impl: str) -> int:
        return saved_for_backward(
            lambda: ragged_attention(*inputs, *counts(queries, keys), scale=SCALE, impl=impl), exclude=inputs
        )

    assert kept("grouped") < kept("reference") / 10


@every_impl
def test_derivatives_of_torch_func_and_vmap(impl: str) -> None:
    inputs = tuple(tokens.detach() for tokens in draw(*LENGTHS))
    tangents = tuple(torch.randn_like(tokens) for tokens in inputs)

    def function(*inputs: Tensor) -> Tensor:
        return ragged_attention(*inputs, *counts(*LENGTHS), scale=SCALE, impl=impl)

    output, along = torch.func.jvp(function, inputs, tangents)
    direction = torch.randn_like(output)
    _, pullback = torch.func.vjp(function, *inputs)
    forward = (along * direction).sum()
    assert_close(sum((g * t).sum() for g, t in zip(pullback(direction), tangents, strict=True)), forward, 1e-10)
    several = [torch.stack((tokens, 2 * tokens)) for tokens in inputs]
    assert_close(torch.func.vmap(function)(*several)[1], function(*(2 * tokens for tokens in inputs)), 1e-12)


@every_impl
def test_an_empty_batch_runs_backward_too(impl: str) -> None:
    inputs = draw([], [])
    output = ragged_attention(*inputs, *counts([], []), scale=SCALE, impl=impl)
    assert output.shape == (0, 2, 8)
    output.sum().backward()


@every_impl
def test_many_tokens_in_half_precision(impl: str) -> None:
    """The mean of 20,000 values: neither sums that overflow nor weights that vanish."""
    query, key, value = torch.zeros(1, 1, 8), torch.zeros(20_000, 1, 8), 100 + torch.randn(20_000, 1, 8)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [tokens.to(dtype) for tokens in (query, key, value)]
        output = ragged_attention(*inputs, *counts([1], [20_000]), scale=SCALE, impl=impl)
        mean = inputs[2].double().mean(0)
        assert ((output[0].double() - mean).abs() <= torch.finfo(dtype).eps * mean).all()


def test_a_kernel_that_cannot_run_says_so() -> None:
    inputs = draw(*LENGTHS)
    with pytest.raises(ImplementationUnavailable, match="varlen"):
        ragged_attention(*inputs, *counts(*LENGTHS), scale=SCALE, impl="varlen")


def test_what_is_wrong_is_said() -> None:
    query, key, value = draw([2, 1], [3, 3])
    two, three = counts([2, 1], [3, 3])
    with pytest.raises(InvalidArgument, match=r"query_lengths: expected counts that add up to 3 rows, got \[3, 3\]"):
        ragged_attention(query, key, value, three, three, scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"key_lengths: expected counts that add up to 6 rows, got \[7, -1\]"):
        ragged_attention(query, key, value, two, torch.tensor([7, -1]), scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"key_lengths: expected a key for every image with queries"):
        ragged_attention(query, key, value, two, torch.tensor([6, 0]), scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of .*got 'fast'"):
        ragged_attention(query, key, value, two, three, scale=SCALE, impl="fast")


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_shape_or_a_type_is_said() -> None:
    query, key, value = draw([2, 1], [3, 3])
    two, three = counts([2, 1], [3, 3])
    with pytest.raises(InvalidArgument, match=r"query: expected shape \[T, H, d\]"):
        ragged_attention(query[0], key, value, two, three, scale=SCALE)
    with pytest.raises(InvalidType, match="key: expected a floating-point tensor"):
        ragged_attention(query, key.long(), value, two, three, scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"key: .*H, d of query \(3, 2, 8\), got \(6, 1, 8\)"):
        ragged_attention(query, key[:, :1], value, two, three, scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"value: expected the shape of key \(6, 2, 8\)"):
        ragged_attention(query, key, value[:2], two, three, scale=SCALE)
    with pytest.raises(InvalidType, match=r"query_lengths: expected integers \[B\], got dtype torch.float32"):
        ragged_attention(query, key, value, two.float(), three, scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"key_lengths: expected shape \[B\]"):
        ragged_attention(query, key, value, two, three[None], scale=SCALE)
    with pytest.raises(InvalidArgument, match="key_lengths: expected one for each of 2 images, got 1"):
        ragged_attention(query, key, value, two, torch.tensor([6]), scale=SCALE)
