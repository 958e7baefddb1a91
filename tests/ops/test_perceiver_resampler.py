"""The resampler's attention against a loop over latents and heads, and the stretching of time embeddings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.perceiver_resampler import (
    IMPLEMENTATIONS,
    perceiver_attention,
    perceiver_attention_weights,
    time_embeddings,
)
from tests.support import assert_close, assert_within_budget, assert_within_budget_on_average, gradients

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
FAST = [impl for impl in IMPLEMENTATIONS if impl != "reference"]
HEADS = 2


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The paper's pseudo-code, sample by sample and head by head, in the precision of the inputs."""
    samples = []
    for b in range(len(query)):
        media = torch.ones(key.shape[2] - query.shape[2], dtype=torch.bool) if mask is None else mask[b]
        keep = torch.cat((media, torch.ones(query.shape[2], dtype=torch.bool)))
        reads = [
            (queries @ keys[keep].T / math.sqrt(queries.shape[-1])).softmax(-1) @ values[keep]
            for queries, keys, values in zip(query[b], key[b], value[b], strict=True)
        ]
        samples.append(torch.stack(reads))
    return torch.stack(samples)


def draw(batch: int = 3, latents: int = 4, tokens: int = 7, width: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries of latents, keys and values of media tokens and latents."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, HEADS, length, width, generator=generator, dtype=torch.float64).requires_grad_()
        for length in (latents, tokens + latents, tokens + latents)
    )


def attend(*inputs: Tensor, impl: str, mask: Tensor | None = None) -> Tensor:
    return plain(*inputs, mask) if impl == "plain" else perceiver_attention(*inputs, mask=mask, impl=impl)


MASK = torch.arange(7) < torch.tensor([[7], [0], [3]])


@every_implementation
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_latents_read_media_and_each_other(impl: str, mask: Tensor | None) -> None:
    inputs = draw()
    expected, output = (attend(*inputs, impl=name, mask=mask) for name in ("plain", impl))
    assert_close(output, expected, 1e-12)
    for ours, theirs in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("mask", [None, MASK[:, :2]], ids=["whole", "masked"])
def test_reference_passes_gradcheck(mask: Tensor | None) -> None:
    inputs = draw(latents=2, tokens=2, width=1)
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, impl="reference", mask=mask), inputs)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 7, 8, 9]),
    st.sampled_from([1, 3, 15, 16, 17]),
    st.sampled_from([1, 2, 5]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_fast_forms_have_the_numbers_of_the_plain_formula(
    batch: int, latents: int, tokens: int, width: int, masked: bool, strided: bool, seed: int
) -> None:
    inputs = draw(batch, latents, tokens, width=width)
    if strided:
        inputs = tuple(x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs)
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    expected = attend(*inputs, impl="plain", mask=mask)
    for impl in FAST:
        output = attend(*inputs, impl=impl, mask=mask)
        assert_close(output, expected, 1e-10)
        for ours, theirs in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
            assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_low_precision_is_as_good_as_the_plain_formula(impl: str, dtype: torch.dtype, masked: bool) -> None:
    mask = torch.arange(33) < torch.tensor([[33], [0], [17]]) if masked else None

    def run(impl: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        output = attend(*inputs, impl=impl, mask=mask)
        assert output.dtype == inputs[0].dtype
        return [output, *gradients(output, *inputs)]

    draws = []
    for seed in range(8):
        drawn = draw(latents=9, tokens=33, width=8, seed=seed)
        low, exact = (
            tuple(x.detach().to(dtype).to(to).requires_grad_() for x in drawn) for to in (dtype, torch.float64)
        )
        draws.append((run(impl, low), run("plain", low), run("plain", exact)))
    assert_within_budget_on_average(draws)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1024, 65536])
def test_many_tokens_count_in_every_precision(impl: str, dtype: torch.dtype, tokens: int) -> None:
    """Weights of 1 / 65536 each, below what float16 can hold precisely, still add up to the mean."""
    query, key, value = (x.detach()[:1] for x in draw(latents=2, tokens=tokens))
    low = [x.to(dtype) for x in (0 * query, key, 100 + value)]
    mean = low[2].double().mean(2, keepdim=True).expand(-1, -1, 2, -1)
    read = perceiver_attention(*low, impl=impl).double()
    # One rounding of the result, and those of a sum in float32, which drift apart as a random walk does.
    allowed = torch.finfo(dtype).eps + math.sqrt(tokens) * torch.finfo(torch.float32).eps
    assert ((read - mean).abs() <= allowed * mean.abs()).all()


@every_implementation
def test_a_mask_is_a_truncation_and_order_does_not_matter(impl: str) -> None:
    query, key, value = draw()
    cut = [torch.cat((x[:, :, :4], x[:, :, 7:]), 2) for x in (key, value)]
    whole = attend(query, *cut, impl=impl)
    shuffled = torch.randperm(7)
    order = torch.cat((shuffled, torch.arange(7, 11)))
    mask = (torch.arange(7) < 4).expand(3, 7)
    assert_close(attend(query, key, value, impl=impl, mask=mask), whole, 1e-12)
    moved = attend(query, key[:, :, order], value[:, :, order], impl=impl, mask=mask[:, shuffled])
    assert_close(moved, whole, 1e-12)


@every_implementation
def test_without_media_latents_read_each_other(impl: str) -> None:
    query, key, value = draw()
    nothing = attend(query, key, value, impl=impl, mask=torch.zeros(3, 7, dtype=torch.bool))
    assert_close(nothing, attend(query, key[:, :, 7:], value[:, :, 7:], impl=impl), 1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(nothing, query, key, value))


def test_weights_are_those_of_the_media() -> None:
    query, key, _ = draw()
    shares = perceiver_attention_weights(query, key, mask=MASK)
    assert shares.shape == (3, HEADS, 4, 7)
    assert (shares[1] == 0).all()
    assert (shares[2, ..., 3:] == 0).all()
    rows = shares.sum(-1)
    assert (rows < 1).all()
    assert (rows[[0, 2]] > 0).all()


def test_up_to_the_trained_length_time_embeddings_are_the_table() -> None:
    table = torch.randn(8, 3)
    for frames in range(1, 9):
        assert torch.equal(time_embeddings(table, frames), table[:frames])
        assert torch.equal(time_embeddings(table, frames, torch.tensor(frames)), table[:frames])


@pytest.mark.parametrize(("length", "frames"), [(8, 30), (4, 5), (2, 3), (1, 6), (7, 13)])
def test_beyond_it_they_are_interpolated_linearly(length: int, frames: int) -> None:
    table = torch.randn(length, 3, dtype=torch.float64)
    expected = interpolate(table.T[None], size=frames, mode="linear", align_corners=True)[0].T
    assert_close(time_embeddings(table, frames), expected, 1e-12)
    assert_close(time_embeddings(table, frames, torch.tensor(frames)), expected, 1e-12)


def test_frames_after_the_last_real_one_stretch_nothing() -> None:
    table = torch.randn(4, 3, dtype=torch.float64)
    counts = torch.tensor([[0, 1, 4], [5, 7, 9]])
    padded = time_embeddings(table, 9, counts)
    assert padded.shape == (2, 3, 9, 3)
    assert torch.isfinite(padded).all()
    for row, column in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        count = counts[row, column]
        alone = time_embeddings(table, int(count), count)
        assert_close(padded[row, column, : int(count)], alone, 1e-12)


def test_time_embeddings_pass_gradcheck_and_keep_their_precision() -> None:
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda table: time_embeddings(table, 5, torch.tensor([2, 5])), table)
    for dtype in (torch.bfloat16, torch.float16):
        low = time_embeddings(table.to(dtype), 5, torch.tensor(5))
        assert low.dtype == dtype
        exact = time_embeddings(table, 5, torch.tensor(5))
        assert_within_budget(low, exact.to(dtype), exact)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of .*got 'flash'"):
        perceiver_attention(*draw(), impl="flash")


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_shape_or_a_type_is_said() -> None:
    query, key, value = draw()
    with pytest.raises(InvalidArgument, match=r"query: expected shape \[B, H, K, E\], got shape \(3, 4, 3\)"):
        perceiver_attention(query[:, 0], key, value)
    with pytest.raises(InvalidArgument, match=r"key: expected .* of query \(3, 2, 4, 3\).*got \(2, 2, 11, 3\)"):
        perceiver_attention(query, key[1:], value)
    with pytest.raises(InvalidArgument, match=r"key: expected .*S at least its K, got \(3, 2, 2, 3\)"):
        perceiver_attention(query, key[:, :, :2], value)
    with pytest.raises(InvalidArgument, match=r"value: expected the shape of key \(3, 2, 11, 3\)"):
        perceiver_attention(query, key, value[:, :, 1:])
    with pytest.raises(InvalidType, match="mask: expected a boolean tensor"):
        perceiver_attention(query, key, value, mask=MASK.float())
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, N\] = \(3, 7\)"):
        perceiver_attention(query, key, value, mask=MASK[:, 1:])
