from fractions import Fraction
from functools import partial
from itertools import accumulate

import pytest
import torch
import vit_pytorch.ats_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType
from narrows.ops.token_sampling import (
    SampledTokens,
    TokenSample,
    gather_tokens,
    gumbel_sample,
    inverse_transform_sample,
    restore,
    sampled_attention,
    significance,
)
from tests.kernels import CHIPS, compile_for
from tests.support import assert_close, assert_within_budget, gradients


def naive_sample(scores: list, num_samples: int) -> list[int]:
    """The formula of the docstring in the numbers it is given: floats, or fractions that round nothing."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    total = list(accumulate(scores[i] for i in order))
    cdf = [(value - total[0]) / (total[-1] - total[0]) for value in total]
    start = min(value for value in cdf if value > 0)
    quantiles = [start + k * (1 - start) / (num_samples - 1) for k in range(num_samples)]
    return sorted({order[min(range(len(cdf)), key=lambda j: abs(cdf[j] - y))] for y in quantiles})


def kept(sample: TokenSample) -> list[list[int]]:
    assert sample.ids.masked_select(~sample.mask).count_nonzero() == 0, "slots left over are 0"
    assert (sample.mask.int().diff(dim=1) <= 0).all(), "slots that hold a token come first"
    return [ids[mask].tolist() for ids, mask in zip(*sample, strict=True)]


def tails(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


both_samplings = pytest.mark.parametrize("impl", ["reference", "static"])


# Inverse-transform sampling


@both_samplings
def test_a_worked_example(impl: str) -> None:
    # Sorted: 1 1 2 4 8 at 0 2 1 4 3; sums less the first: 0 1 3 7 15; quantiles 1, 8, 15 of 15.
    scores = torch.tensor([[1.0, 2.0, 1.0, 8.0, 4.0]])
    assert kept(inverse_transform_sample(scores, 3, impl=impl)) == [[2, 3, 4]]


@both_samplings
def test_token_sets_are_those_of_the_formula_in_float64(impl: str) -> None:
    """1,000 rows, flat to sharp, a third with zeros, all with a masked tail."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_samples in [(5, 3), (16, 7), (31, 30), (49, 20)]:
        logits = torch.randn(250, num_tokens, generator=generator, dtype=torch.float64)
        scores = (logits * torch.linspace(0.1, 4, 250)[:, None]).softmax(-1)
        scores[::3] *= torch.rand(84, num_tokens, generator=generator) < 0.6
        lengths = torch.randint(2, num_tokens + 1, (250,), generator=generator).tolist()
        scores[:, :2] += 1e-3  # at least two tokens, so that the formula is defined
        sample = inverse_transform_sample(
            scores, num_samples, tails(lengths, num_tokens), sample_always=True, impl=impl
        )
        expected = [naive_sample(row[:n], num_samples) for row, n in zip(scores.tolist(), lengths, strict=True)]
        assert kept(sample) == expected


@both_samplings
def test_ties_are_decided_exactly(impl: str) -> None:
    """Small whole numbers, where quantiles fall in the middle between entries, against exact fractions."""
    generator = torch.Generator().manual_seed(0)
    for num_samples in (2, 3, 4, 5, 9):
        scores = torch.randint(0, 4, (60, 9), generator=generator).float()
        scores[:, 4], scores[:, 5] = 4.0, 1.0
        expected = [naive_sample([Fraction(int(s)) for s in row], num_samples) for row in scores.tolist()]
        assert kept(inverse_transform_sample(scores, num_samples, sample_always=True, impl=impl)) == expected


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 3, 7, 8, 9, 31, 33]),
    num_samples=st.sampled_from([1, 2, 5, 8, 32, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    levels=st.sampled_from([1, 3, 1000]),
    sample_always=st.booleans(),
    seed=st.integers(0, 99),
)
def test_static_shapes_keep_what_the_reference_keeps(
    num_tokens: int, num_samples: int, dtype: torch.dtype, levels: int, sample_always: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (num_tokens, 4), generator=generator).to(dtype).t()
    mask = torch.rand(4, num_tokens, generator=generator) < 0.8
    for given_mask in (None, mask):
        fast, plain = (
            inverse_transform_sample(scores, num_samples, given_mask, sample_always=sample_always, impl=impl)
            for impl in ("static", "reference")
        )
        assert kept(fast) == kept(plain)
        assert fast.ids.shape == fast.mask.shape == (4, num_samples)
        assert all(len(set(ids)) == len(ids) and ids == sorted(ids) for ids in kept(fast))
        if given_mask is not None:
            assert all(row[ids].all() for row, ids in zip(mask, kept(fast), strict=True))
            fits = mask.sum(1) <= (1 if sample_always else num_samples)
            assert all(len(ids) == n for ids, n, f in zip(kept(fast), mask.sum(1), fits, strict=True) if f)


@both_samplings
def test_a_mask_is_truncation(impl: str) -> None:
    scores = torch.rand(6, 20)
    lengths = [20, 13, 9, 8, 1, 0]
    masked = kept(inverse_transform_sample(scores, 8, tails(lengths, 20), impl=impl))
    assert masked == [
        kept(inverse_transform_sample(row[None, :n], 8, impl=impl))[0] if n else []
        for row, n in zip(scores, lengths, strict=True)
    ]


@both_samplings
def test_masked_tokens_may_hold_anything(impl: str) -> None:
    scores, mask = torch.rand(3, 12), tails([9, 7, 0], 12)
    expected = kept(inverse_transform_sample(scores, 5, mask, impl=impl))
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        filled = scores.masked_fill(~mask, garbage)
        assert kept(inverse_transform_sample(filled, 5, mask, impl=impl)) == expected
        assert kept(gumbel_sample(filled, 5, mask, impl=impl))[2] == []


@both_samplings
def test_a_diverged_model_gets_tokens_in_range(impl: str) -> None:
    scores = torch.tensor([[torch.nan] * 6, [torch.inf] * 6, [-1.0] * 6, [0.0] * 6, [torch.nan, 1, 2, 3, 4, 5]])
    for sample in (inverse_transform_sample(scores, 3, impl=impl), gumbel_sample(scores, 3, impl=impl)):
        assert all(1 <= len(ids) <= 3 and max(ids) < 6 for ids in kept(sample))


@both_samplings
def test_all_zero_scores_sample_the_raster_evenly(impl: str) -> None:
    flat = inverse_transform_sample(torch.zeros(1, 12), 4, impl=impl)
    assert kept(flat) == kept(inverse_transform_sample(torch.ones(1, 12), 4, impl=impl)) == [[1, 4, 8, 11]]


@both_samplings
def test_one_sample_is_the_greatest_score(impl: str) -> None:
    scores = torch.rand(5, 9)
    assert kept(inverse_transform_sample(scores, 1, impl=impl)) == scores.argmax(1, keepdim=True).tolist()


@both_samplings
def test_an_image_that_fits_keeps_all_its_tokens_unless_told_to_sample(impl: str) -> None:
    scores, mask = torch.rand(3, 10) ** 3, tails([10, 6, 5], 10)
    assert kept(inverse_transform_sample(scores, 6, mask, impl=impl))[1:] == [[*range(6)], [*range(5)]]
    adaptive = kept(inverse_transform_sample(scores, 10, mask, sample_always=True, impl=impl))
    assert [len(ids) < n for ids, n in zip(adaptive, (10, 6, 5), strict=True)] == [True] * 3


@both_samplings
def test_order_of_tokens_does_not_matter(impl: str) -> None:
    scores, order = torch.rand(1, 30), torch.randperm(30)
    sample = kept(inverse_transform_sample(scores[:, order], 11, impl=impl))[0]
    assert sorted(order[sample].tolist()) == kept(inverse_transform_sample(scores, 11, impl=impl))[0]


@both_samplings
def test_the_prefix_stands_before_the_sample(impl: str) -> None:
    scores, mask = torch.rand(3, 12), tails([12, 7, 0], 12)
    alone = inverse_transform_sample(scores, 5, mask, impl=impl)
    after = inverse_transform_sample(scores, 5, mask, prefix=2, impl=impl)
    assert after.ids.shape == (3, 7)
    assert kept(after) == [[0, 1, *(place + 2 for place in ids)] for ids in kept(alone)]


@pytest.mark.compiled  # Shape checks would wrap what Triton reads the source of.
@pytest.mark.parametrize(("block", "chips"), [(256, CHIPS), (2048, CHIPS[:1])], ids=str)
def test_the_kernel_fits_into_registers(block: int, chips: tuple[int, ...]) -> None:
    """Of 224 pixels in patches of 16, and of as many tokens as it takes."""
    triton = pytest.importorskip("narrows.ops.token_sampling.triton")
    types = {"scores": "*fp32", "mask": "*i1", "ids": "*i64", "kept": "*i1", "N": "i32", "K": "i32"}
    types |= dict.fromkeys(("stride_b", "stride_n", "mask_stride_b", "mask_stride_n"), "i32")
    constants = {"SAMPLE_ALWAYS": False, "PREFIX": 1, "GREATEST": torch.finfo(torch.float32).max, "SLOTS": block}
    for chip in chips:
        usage = compile_for(
            chip,
            triton._sample,
            types,
            {**constants, "BLOCK": block},
            num_warps=triton.num_warps(block),
            num_stages=3,
        )
        assert usage.spilled == 0, (chip, usage)


def test_sharper_scores_keep_fewer_tokens_in_the_papers_setting() -> None:
    logits = torch.randn(64, 196)
    counts = [
        inverse_transform_sample((t * logits).softmax(-1), 196, sample_always=True).mask.sum(1).double().mean()
        for t in (0.0, 0.5, 1.0, 2.0)
    ]
    assert counts[0] == 195
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 100


# What upstream's sampling loses


def upstream_kept(scores: Tensor, num_samples: int) -> list[list[int]]:
    """Through upstream's module: attention that is the scores, values of norm 1."""
    batch, num_tokens = scores.shape
    attention = torch.cat((torch.zeros(batch, 1), scores), 1)[:, None, None].expand(-1, -1, num_tokens + 1, -1)
    mask = torch.ones(batch, num_tokens + 1, dtype=torch.bool)
    values = torch.ones(batch, 1, num_tokens + 1, 1)
    _, mask, ids = vit_pytorch.ats_vit.AdaptiveTokenSampling(num_samples)(attention, values, mask)
    return [(row[m][1:] - 1).tolist() for row, m in zip(ids, mask, strict=True)]


def test_upstream_wastes_its_budget_on_repeated_draws_and_quantiles_do_not() -> None:
    flat = torch.full((16, 196), 1 / 196)
    assert all(len(ids) == 98 for ids in kept(inverse_transform_sample(flat, 98)))
    assert max(len(ids) for ids in upstream_kept(flat, 98)) < 98


def test_upstream_may_lose_a_token_with_a_tenth_of_the_mass_and_quantiles_never_do() -> None:
    scores = torch.rand(64, 196)
    scores[:, 7] = scores.sum(1) / 9
    scores /= scores.sum(1, keepdim=True)
    assert all(7 in ids for ids in kept(inverse_transform_sample(scores, 16)))
    assert not all(7 in ids for ids in upstream_kept(scores, 16))


def test_quantiles_keep_more_of_the_score_than_draws() -> None:
    scores = torch.randn(32, 196).softmax(-1)

    def mass(sample: TokenSample) -> Tensor:
        return (scores.gather(1, sample.ids) * sample.mask).sum(1).mean()

    assert mass(inverse_transform_sample(scores, 98)) > mass(gumbel_sample(scores, 98)) + 0.05


# Gumbel sampling


def test_gumbel_draws_what_upstream_draws_for_the_same_seed() -> None:
    scores = torch.randn(8, 50).softmax(-1)
    for impl in ("reference", "static"):
        torch.manual_seed(5)
        expected = upstream_kept(scores, 20)
        torch.manual_seed(5)
        assert kept(gumbel_sample(scores, 20, impl=impl)) == expected


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 7, 8, 9, 33]),
    num_samples=st.sampled_from([1, 5, 8, 40]),
    sample_always=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_race_keeps_what_gumbel_max_keeps(
    num_tokens: int, num_samples: int, sample_always: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, num_tokens, generator=generator).square()
    scores /= scores.sum(1, keepdim=True)
    mask = torch.rand(3, num_tokens, generator=generator) < 0.8
    fast, plain = (
        gumbel_sample(
            scores,
            num_samples,
            mask,
            sample_always=sample_always,
            generator=torch.Generator().manual_seed(seed),
            impl=impl,
        )
        for impl in ("static", "reference")
    )
    assert kept(fast) == kept(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_scores_in_any_dtype(dtype: torch.dtype) -> None:
    """Upstream draws noise in bfloat16, which has too few values to follow any distribution."""
    scores = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=dtype).expand(20_000, -1)
    drawn = gumbel_sample(scores, 1, generator=torch.Generator().manual_seed(0)).ids
    frequencies = drawn.flatten().bincount(minlength=5) / 20_000
    # Four standard deviations of a binomial, and what bfloat16 does to 0.4.
    assert (frequencies - scores[0].float()).abs().max() < 4 * (0.24 / 20_000) ** 0.5 + 1e-3


def test_a_generator_repeats_its_draws() -> None:
    scores = torch.rand(4, 30)
    first, again, other = (gumbel_sample(scores, 9, generator=torch.Generator().manual_seed(s)).ids for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Significance


def test_significance_is_attention_times_value_norm_summed_over_heads() -> None:
    attention, norms = torch.rand(2, 3, 7, dtype=torch.float64), torch.rand(2, 3, 7, dtype=torch.float64)
    mask = tails([7, 4], 7)
    scores = significance(attention, norms, mask)
    for b in range(2):
        products = [sum(attention[b, h, n] * norms[b, h, n] for h in range(3)) for n in range([7, 4][b])]
        assert_close(scores[b, : len(products)], torch.stack(products) / sum(products), 1e-12)
    assert (scores[1, 4:] == 0).all()
    assert torch.autograd.gradcheck(
        lambda a, v: significance(a, v, mask), (attention.requires_grad_(), norms.requires_grad_())
    )


def test_significance_is_defined_everywhere() -> None:
    attention = torch.rand(3, 2, 5).requires_grad_()
    with torch.no_grad():
        attention[0, :, 4], attention[2] = torch.nan, 0.0
    scores = significance(attention, torch.ones(3, 2, 5), tails([4, 0, 5], 5))
    assert_close(scores.sum(1), torch.tensor([1.0, 0.0, 0.0]))
    (gradient,) = gradients(scores, attention)
    assert torch.isfinite(gradient).all()
    assert significance(torch.rand(1, 1, 3).half(), torch.rand(1, 1, 3).half()).dtype == torch.float32


# Attention


def attention_inputs(dtype: torch.dtype = torch.float64, batch: int = 3, tokens: int = 9) -> list[Tensor]:
    """Queries, keys and values `[B, N, 3, 2]`."""
    generator = torch.Generator().manual_seed(0)
    return [
        (1.5 * torch.randn(batch, tokens, 3, 2, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(3)
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> SampledTokens:
    return sampled_attention(query[:, 0], partial(gather_tokens, query), key, value, **kwargs)


def quantile(num_tokens: int) -> object:
    return lambda scores, mask: inverse_transform_sample(scores, num_tokens, mask)


def every_other(scores: Tensor, mask: Tensor | None) -> TokenSample:
    """A choice that no rounding can change."""
    ids = torch.arange(0, scores.shape[1], 2).expand(scores.shape[0], -1)
    return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.gather(1, ids))


both_attentions = pytest.mark.parametrize("impl", ["reference", "fused"])


@both_attentions
def test_attention_is_a_loop_over_images_heads_and_kept_tokens(impl: str) -> None:
    query, key, value = attention_inputs()
    sampled = attend(query, key, value, sampler=quantile(4), impl=impl)
    for b in range(3):
        q, k, v = query[b], key[b], value[b]
        attention = torch.stack([(q[:, h] @ k[:, h].T / 2**0.5).softmax(-1) for h in range(3)])
        scores = sum(attention[h, 0, 1:] * v[1:, h].norm(dim=-1) for h in range(3))
        ids = [0, *(1 + i for i in naive_sample(scores.tolist(), 4))]
        assert sampled.ids[b, : len(ids)].tolist() == ids
        assert sampled.mask[b].sum() == len(ids)
        for slot, n in enumerate(ids):
            heads = torch.cat([attention[h, n] @ v[:, h] for h in range(3)])
            assert_close(sampled.tokens[b, slot], heads, 1e-10)
        assert torch.isfinite(sampled.tokens[b]).all()


@pytest.mark.parametrize("mask", [None, tails([9, 5, 2], 9)], ids=["unmasked", "masked"])
def test_the_fused_form_is_the_reference(mask: Tensor | None) -> None:
    inputs = attention_inputs()
    results = [attend(*inputs, sampler=quantile(4), mask=mask, impl=impl) for impl in ("fused", "reference")]
    assert torch.equal(results[0].ids, results[1].ids)
    assert torch.equal(results[0].mask, results[1].mask)
    rows = [result.tokens * result.mask[..., None] for result in results]
    assert_close(*rows, 1e-10)
    for fast, plain in zip(*(gradients(row, *inputs) for row in rows), strict=True):
        assert_close(fast, plain, 1e-10)


def test_gradcheck_of_the_reference() -> None:
    def function(*inputs: Tensor) -> Tensor:
        return attend(*inputs, sampler=every_other, mask=tails([5, 3], 5), impl="reference").tokens

    assert torch.autograd.gradcheck(function, attention_inputs(batch=2, tokens=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_attentions
def test_low_precision_attention_is_within_budget(impl: str, dtype: torch.dtype) -> None:
    """For a fixed choice of tokens: which are chosen is a step function, and has its own tests."""
    inputs = attention_inputs(dtype)
    doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query[:, [0, 1, 3, 5, 7]].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        attended = (query @ key.transpose(-1, -2) / 2**0.5).softmax(-1) @ value
        return attended.transpose(1, 2).flatten(2)

    oracle, textbook = plain(*doubled), plain(*inputs)
    exact, lost = gradients(oracle, *doubled), gradients(textbook, *inputs)
    fast = attend(*inputs, sampler=every_other, impl=impl).tokens
    assert fast.dtype == dtype
    assert_within_budget(fast, textbook, oracle)
    for found, plain_gradient, gradient in zip(gradients(fast, *inputs), lost, exact, strict=True):
        assert_within_budget(found, plain_gradient, gradient)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 3, 8, 9, 17]),
    capacity=st.sampled_from([1, 4, 8, 20]),
    lengths=st.lists(st.integers(0, 17), min_size=2, max_size=2),
)
def test_a_masked_image_is_the_image_alone(num_tokens: int, capacity: int, lengths: list[int]) -> None:
    mask = tails(lengths, num_tokens)
    inputs = [tensor.detach() for tensor in attention_inputs(batch=2, tokens=num_tokens)]
    inputs = [tensor.masked_fill(~mask[..., None, None], 1e6).requires_grad_() for tensor in inputs]
    for impl in ("reference", "fused"):
        result = attend(*inputs, sampler=quantile(capacity), mask=mask, impl=impl)
        assert result.tokens.shape == (2, capacity + 1, 6)
        assert all(torch.isfinite(gradient).all() for gradient in gradients(result.tokens, *inputs))
        for b, length in enumerate(lengths):
            if length == 0:
                assert not result.mask[b].any()
                assert torch.isfinite(result.tokens[b]).all()
            else:
                one = [tensor[b : b + 1, :length] for tensor in inputs]
                alone = attend(*one, sampler=quantile(capacity), impl=impl)
                assert torch.equal(result.ids[b], alone.ids[0])
                assert torch.equal(result.mask[b], alone.mask[0])
                assert_close(result.tokens[b, alone.mask[0]], alone.tokens[alone.mask], 1e-10)


def test_scores_are_taken_before_dropout() -> None:
    """Upstream takes them after it."""
    inputs = attention_inputs()
    expected = attend(*inputs, sampler=quantile(4))
    for impl in ("reference", "fused"):
        dropped = attend(*inputs, sampler=quantile(4), dropout=0.8, impl=impl)
        assert torch.equal(dropped.ids, expected.ids)
        assert not torch.equal(dropped.tokens, expected.tokens)


def test_queries_of_dropped_tokens_are_never_asked_for() -> None:
    query, key, value = attention_inputs()
    asked: list[Tensor] = []

    def queries(ids: Tensor) -> Tensor:
        asked.append(ids)
        return gather_tokens(query, ids)

    sampled = sampled_attention(query[:, 0], queries, key, value, sampler=quantile(4), impl="fused")
    assert len(asked) == 1
    assert torch.equal(asked[0], sampled.ids)


@pytest.mark.parametrize("num_tokens", [1_000, 8_000, 64_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tokens_in_half_precision(dtype: torch.dtype, num_tokens: int) -> None:
    """Queries of zero read the mean; the scores that then decide are the norms of values, in float32."""
    value = (100 + torch.randn(1, num_tokens, 2, 8)).to(dtype)
    still, scored = torch.zeros_like(value), []

    def sampler(scores: Tensor, mask: Tensor | None) -> TokenSample:
        scored.append(scores)
        return inverse_transform_sample(scores, 8, mask)

    norms = value[:, 1:].double().norm(dim=-1).sum(-1)
    mean = value.double().mean(1).flatten()
    for impl in ("reference", "fused") if num_tokens == 1_000 else ("fused",):
        sampled = attend(still, still, value, sampler=sampler, impl=impl)
        assert ((sampled.tokens[sampled.mask].double() - mean).abs() <= 2 * torch.finfo(dtype).eps * mean).all()
        assert_close(scored[-1] * norms.sum() / norms, torch.ones(1, num_tokens - 1), 1e-5)


# Transformations of torch.func


@both_samplings
def test_vmap_samples_as_a_loop_does(impl: str) -> None:
    scores, mask = torch.rand(4, 3, 12), torch.rand(4, 3, 12) < 0.8
    found = torch.func.vmap(lambda s, m: tuple(inverse_transform_sample(s, 5, m, impl=impl)))(scores, mask)
    for index in range(4):
        expected = inverse_transform_sample(scores[index], 5, mask[index], impl=impl)
        assert torch.equal(found[0][index], expected.ids)
        assert torch.equal(found[1][index], expected.mask)


@both_samplings
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws(impl: str, randomness: str) -> None:
    scores = torch.rand(3, 12).expand(4, -1, -1)
    draw = torch.func.vmap(lambda s: tuple(gumbel_sample(s, 5, impl=impl)), randomness=randomness)
    samples = [TokenSample(ids, mask) for ids, mask in zip(*draw(scores), strict=True)]
    assert all(1 <= len(ids) <= 5 for sample in samples for ids in kept(sample))
    assert all(kept(sample) == kept(samples[0]) for sample in samples[1:]) == (randomness == "same")


@both_samplings
def test_a_choice_has_no_derivative(impl: str) -> None:
    scores = torch.rand(2, 9)
    for sample in (inverse_transform_sample, gumbel_sample):
        chosen = torch.func.jvp(lambda s, f=sample: f(s, 4, impl=impl).ids.double(), (scores,), (scores,))
        assert (chosen[1] == 0).all()
        jacobian = torch.func.jacrev(lambda s, f=sample: f(s, 4, impl=impl).ids.double())(scores)
        assert (jacobian == 0).all()


@both_samplings
def test_nothing_to_choose_from(impl: str) -> None:
    """A class token alone, and an empty batch."""
    for sample in (inverse_transform_sample, gumbel_sample):
        assert kept(sample(torch.rand(2, 0), 3, impl=impl)) == [[], []]
        empty = sample(torch.rand(0, 5), 3, torch.ones(0, 5, dtype=torch.bool), impl=impl)
        assert empty.ids.shape == empty.mask.shape == (0, 3)


# Back on the grid


def test_restore_puts_tokens_back_and_leaves_the_rest() -> None:
    tokens = torch.randn(3, 9, 6, dtype=torch.float64)
    sampled = attend(*attention_inputs(), sampler=quantile(4))
    restored = restore(sampled, tokens)
    for b in range(3):
        where = sampled.ids[b, sampled.mask[b]]
        assert torch.equal(restored[b, where], sampled.tokens[b, sampled.mask[b]])
        others = [n for n in range(9) if n not in where.tolist()]
        assert others
        assert torch.equal(restored[b, others], tokens[b, others])
    assert torch.equal(gather_tokens(restored, sampled.ids)[sampled.mask], sampled.tokens[sampled.mask])


def test_restore_ignores_slots_left_over_and_passes_gradients() -> None:
    tokens = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor([[0, 2, 0]]), torch.tensor([[True, True, False]])
    assert torch.equal(restore(SampledTokens(tokens, ids, mask), fill)[0, 0], tokens[0, 0])
    assert torch.autograd.gradcheck(lambda t, f: restore(SampledTokens(t, ids, mask), f), (tokens, fill))


# Errors


@pytest.mark.compiled  # jaxtyping would speak first
def test_errors_name_the_argument() -> None:
    scores = torch.rand(2, 5)
    for sample in (inverse_transform_sample, gumbel_sample):
        with pytest.raises(InvalidArgument, match=r"scores: expected shape \[B, N\], got shape \(2, 5, 1\)"):
            sample(scores[..., None], 3)
        with pytest.raises(
            InvalidType, match=r"scores: expected a floating-point tensor \[B, N\], got dtype torch.int64"
        ):
            sample(scores.long(), 3)
        with pytest.raises(InvalidArgument, match="num_samples: expected a positive integer, got 0"):
            sample(scores, 0)
        with pytest.raises(InvalidType, match="mask: expected a boolean tensor"):
            sample(scores, 3, torch.ones(2, 5))
        with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, N\] = \(2, 5\), got shape \(2, 4\)"):
            sample(scores, 3, torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(
            InvalidArgument, match=r"impl: expected 'auto' or one of \['reference', 'static'.* got 'fast'"
        ):
            sample(scores, 3, impl="fast")
    with pytest.raises(ImplementationUnavailable, match="impl='triton' cannot run here: there is no CUDA device"):
        inverse_transform_sample(scores, 3, impl="triton")
    query, key, value = attention_inputs()
    with pytest.raises(InvalidArgument, match=r"key: expected shape \[B, N, H, d\], got shape \(3, 9, 3\)"):
        attend(query, key[..., 0], value, sampler=every_other)
    with pytest.raises(InvalidArgument, match=r"value: expected the shape of key \(3, 9, 3, 2\), got \(3, 8, 3, 2\)"):
        attend(query, key, value[:, 1:], sampler=every_other)
    with pytest.raises(InvalidArgument, match=r"class_query: expected shape \[B, H, d\] = \(3, 3, 2\), got \(3, 2, 2"):
        attend(query[:, :, 1:], key, value, sampler=every_other)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['fused', 'reference'\], got 'fast'"):
        attend(query, key, value, sampler=every_other, impl="fast")
    sampled = SampledTokens(torch.rand(2, 3, 4), torch.zeros(2, 3).long(), torch.ones(2, 3).bool())
    with pytest.raises(InvalidArgument, match=r"fill: expected shape \[B, N, D\] with D = 4, got shape \(2, 9, 5\)"):
        restore(sampled, torch.rand(2, 9, 5))
    with pytest.raises(InvalidArgument, match="fill: expected a batch of 2, got 1"):
        restore(sampled, torch.rand(1, 9, 4))
