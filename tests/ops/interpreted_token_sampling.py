"""The sampling kernel against the formula, by Triton's interpreter: see `tests/kernels.py`."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.costs import count_macs
from narrows.errors import ImplementationUnavailable
from narrows.ops.token_sampling import inverse_transform_sample, triton
from tests.ops import test_token_sampling as plain

assert os.environ.get("TRITON_INTERPRET") == "1", "run me as tests/kernels.py says"


@pytest.mark.parametrize(
    "check",
    [
        plain.test_a_worked_example,
        plain.test_a_mask_is_truncation,
        plain.test_all_zero_scores_sample_the_raster_evenly,
        plain.test_one_sample_is_the_greatest_score,
        plain.test_an_image_that_fits_keeps_all_its_tokens_unless_told_to_sample,
        plain.test_order_of_tokens_does_not_matter,
        plain.test_the_prefix_stands_before_the_sample,
    ],
    ids=lambda check: check.__name__,
)
def test_as_any_implementation(check: Callable[[str], None]) -> None:
    check("triton")


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    B=st.integers(0, 3),
    N=st.sampled_from([0, 1, 2, 15, 16, 17, 40]),
    K=st.sampled_from([1, 2, 5, 16, 33]),
    prefix=st.sampled_from([0, 1, 5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    levels=st.sampled_from([1, 3, 1000]),
    masked=st.booleans(),
    sample_always=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_sets_of_the_reference(
    B: int,
    N: int,
    K: int,
    prefix: int,
    dtype: torch.dtype,
    levels: int,
    masked: bool,
    sample_always: bool,
    strided: bool,
    seed: int,
) -> None:
    """Ties where there are few levels; what is masked holds no number."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (B, N), generator=generator).to(dtype)
    mask = torch.rand(B, N, generator=generator) < 0.7 if masked else None
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.nan)
    if strided:
        scores, mask = scores.t().contiguous().t(), None if mask is None else mask.repeat_interleave(2, 1)[:, ::2]
    found, expected = (
        inverse_transform_sample(scores, K, mask, sample_always=sample_always, prefix=prefix, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_mass_on_one_token_and_scores_of_a_diverged_model(dtype: torch.dtype) -> None:
    scores = torch.zeros(7, 12)
    scores[0, 7], scores[1] = 1.0, torch.arange(12) == 3
    scores[2], scores[3], scores[4] = torch.nan, torch.inf, -1.0
    scores[5, 4:], scores[6] = torch.inf, torch.rand(12) * 1e-6
    scores = scores.to(dtype)
    for mask in (None, torch.arange(12).expand(7, -1) < 9):
        found, expected = (inverse_transform_sample(scores, 6, mask, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.mask, expected.mask)


def test_scores_of_attention_to_as_many_tokens_as_usual() -> None:
    scores = (4 * torch.randn(1, 196)).softmax(-1)
    found, expected = (
        inverse_transform_sample(scores, 196, sample_always=True, impl=impl) for impl in ("triton", "reference")
    )
    assert 1 < found.mask.sum() < 196
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)


def test_it_counts_as_free_of_products(recwarn: pytest.WarningsRecorder) -> None:
    assert count_macs(lambda: inverse_transform_sample(torch.rand(2, 9), 3, impl="triton")) == 0
    assert not recwarn.list


def test_too_many_tokens_are_refused_by_name_and_sampled_by_auto() -> None:
    scores = torch.rand(1, triton.MOST + 1)
    with pytest.raises(ImplementationUnavailable, match=r"impl='triton' cannot run here: it takes 2048 tokens and"):
        inverse_transform_sample(scores, 3, impl="triton")
    assert inverse_transform_sample(scores, 3).mask.all()
    with pytest.raises(ImplementationUnavailable, match=r"it has no rule for torch.func"):
        torch.vmap(lambda row: inverse_transform_sample(row[None], 3, impl="triton").ids)(scores[:, :4])
