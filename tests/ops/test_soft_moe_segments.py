import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.soft_moe import segments_in_number, segments_of_length
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [32, 1024, 65_536])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_long_segments_of_large_tokens_do_not_overflow(
    dtype: torch.dtype, num_tokens: int, masked: bool, autocast: bool
) -> None:
    tokens = 2500 + 10 * torch.randn(2, num_tokens, 3, generator=torch.Generator().manual_seed(1))
    tokens = tokens if autocast else tokens.to(dtype)
    mask = torch.arange(num_tokens).expand(2, num_tokens) < num_tokens - 5 if masked else None
    real = num_tokens - 5 if masked else num_tokens
    with torch.autocast("cpu", dtype=dtype, enabled=autocast and dtype != torch.float32):
        means = (
            segments_of_length(tokens, num_tokens, mask).means[:, 0],
            segments_in_number(tokens, 1, mask).means[:, 0],
        )
    for mean in means:
        assert mean.dtype == tokens.dtype
        # One rounding, and at most N roundings of a sum in float32.
        allowed = torch.finfo(mean.dtype).eps / 2 + num_tokens * torch.finfo(torch.float32).eps
        exact = tokens[:, :real].double().mean(1)
        assert ((mean - exact).abs() <= allowed * exact).all()


def test_a_segment_has_at_least_one_token() -> None:
    with pytest.raises(InvalidArgument, match="length: expected a positive integer, got 0"):
        segments_of_length(torch.randn(1, 3, 4), 0)
    with pytest.raises(InvalidArgument, match="count: expected a positive integer, got 0"):
        segments_in_number(torch.randn(1, 3, 4), 0)
