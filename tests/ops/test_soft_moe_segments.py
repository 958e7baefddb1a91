import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.soft_moe import rms_vectors, segments_in_number, segments_of_length, unit_vectors
from tests.support import assert_close

masks = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=3)
)


def tokens_for(mask: Tensor) -> Tensor:
    return torch.randn(*mask.shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(masks, st.integers(1, 5))
def test_segments_of_length_are_those_of_the_real_tokens_alone(drawn: list[list[bool]], length: int) -> None:
    mask = torch.tensor(drawn)
    tokens = tokens_for(mask)
    means, means_mask = segments_of_length(tokens.masked_fill(~mask[..., None], torch.nan), length, mask)
    assert means_mask is not None
    for b in range(len(drawn)):
        alone = [segment.mean(0) for segment in tokens[b, mask[b]].split(length)] if mask[b].any() else []
        assert means_mask[b].tolist() == [p < len(alone) for p in range(means.shape[1])]
        for p in range(means.shape[1]):
            assert_close(means[b, p], alone[p] if p < len(alone) else torch.zeros(4, dtype=torch.float64), 1e-12)
    unmasked = segments_of_length(tokens, length)
    assert unmasked.mask is None
    assert_close(unmasked.means, torch.stack([s.mean(1) for s in tokens.split(length, 1)], 1), 1e-12)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(masks, st.integers(1, 5))
def test_segments_in_number_are_adaptive_average_pooling_of_the_real_tokens(
    drawn: list[list[bool]], count: int
) -> None:
    mask = torch.tensor(drawn)
    tokens = tokens_for(mask)
    means, means_mask = segments_in_number(tokens.masked_fill(~mask[..., None], torch.nan), count, mask)
    assert means_mask is None
    for b in range(len(drawn)):
        alone = F.adaptive_avg_pool1d(tokens[b, mask[b]].T, count).T if mask[b].any() else torch.zeros(count, 4)
        assert_close(means[b], alone.double(), 1e-12)
    assert_close(segments_in_number(tokens, count).means, F.adaptive_avg_pool1d(tokens.mT, count).mT, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_segments_keep_the_dtype(dtype: torch.dtype) -> None:
    tokens, mask = torch.randn(2, 7, 4, dtype=dtype), torch.rand(2, 7) < 0.5
    for segments in (segments_of_length(tokens, 3, mask), segments_of_length(tokens, 3), segments_in_number(tokens, 3)):
        assert segments.means.dtype == dtype


def test_a_segment_has_at_least_one_token() -> None:
    with pytest.raises(InvalidArgument, match="length: expected a positive integer, got 0"):
        segments_of_length(torch.randn(1, 3, 4), 0)
    with pytest.raises(InvalidArgument, match="count: expected a positive integer, got 0"):
        segments_in_number(torch.randn(1, 3, 4), 0)


def test_unit_vectors_have_length_one_or_the_scale_and_are_smooth_at_zero() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert_close(unit_vectors(x).norm(dim=-1), torch.ones(3, dtype=torch.float64), 1e-6)
    assert_close(unit_vectors(x, torch.tensor(2.5)).norm(dim=-1), torch.full((3,), 2.5, dtype=torch.float64), 1e-6)
    assert torch.autograd.gradcheck(unit_vectors, (x,))
    zero = torch.zeros(1, 5, dtype=torch.float16, requires_grad=True)
    unit_vectors(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_rms_vectors_have_mean_square_one_before_the_gain() -> None:
    x, gain = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64) + 0.5
    assert_close((rms_vectors(x, gain) / gain).square().mean(-1), torch.ones(3, dtype=torch.float64), 1e-9)
    assert torch.autograd.gradcheck(rms_vectors, (x, gain.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_vectors_are_normalised_in_low_precision(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), 1000.0, dtype=dtype)
    assert_close(unit_vectors(x).float(), torch.full((1, 64), 0.125), 1e-3)
    assert_close(rms_vectors(x, torch.ones(64, dtype=dtype)).float(), torch.ones(1, 64), 1e-3)
