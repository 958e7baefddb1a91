"""Inverse-transform sampling on a GPU, in one launch: a program takes one image.

It sorts scores as whole numbers with their places in the last bits, so that no two are equal, sums them up, counts the
quantiles above both midpoints around each entry, as `fast.inverse_transform_sample` does, and sorts the places that are
kept. Whole numbers again: the token sets are those of the reference.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.token_sampling.common import TokenSample

MOST = 2048  # tokens, and slots: sorting more takes long to compile
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _sample(
    scores, mask, ids, kept, N, K, stride_b, stride_n, mask_stride_b, mask_stride_n,
    SAMPLE_ALWAYS: tl.constexpr, PREFIX: tl.constexpr, GREATEST: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Ids and mask `[B, PREFIX + K]` of one image; scores count as at most GREATEST."""
    b, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = lane < N
    if mask is not None:
        real = real & (tl.load(mask + b * mask_stride_b + lane * mask_stride_n, mask=real, other=0) != 0)
    score = tl.load(scores + b * stride_b + lane * stride_n, mask=real, other=0.0).to(tl.float64)
    score = tl.where(score > 0, tl.minimum(score, GREATEST), 0.0)  # what is no number is not above 0
    top = tl.max(score, 0)
    share = tl.where(top > 0, score / tl.where(top > 0, top, 1.0), 1.0)
    # To the nearest whole number, of two the even one: from 2^52 on, float64 has no digits after the point.
    whole = (share * 4294967296.0 + 4503599627370496.0) - 4503599627370496.0

    # Ascending; what is not real comes first, at entries of 0.
    key = tl.sort(tl.where(real, whole.to(tl.int64) * BLOCK + lane, -1))
    sorted_real = key >= 0
    weight = tl.where(sorted_real, key // BLOCK, 0)
    least = tl.min(tl.where(sorted_real, weight, 4294967296), 0)
    entry = tl.maximum(tl.cumsum(weight, 0) - least, 0)
    greatest = tl.max(entry, 0)
    first = tl.min(tl.where(entry > 0, entry, greatest), 0)
    steps = tl.maximum(K - 1, 1).to(tl.int64)
    spacing = tl.maximum(2 * (greatest - first), 1)
    above = tl.minimum(((2 * (greatest - entry) + weight) * steps + spacing - 1) // spacing, K)
    of_next = tl.gather(above, tl.minimum(lane + 1, BLOCK - 1), 0)

    most = 1 if SAMPLE_ALWAYS else K
    fits = tl.sum(real.to(tl.int32), 0) <= most
    goes_on = sorted_real & ((above > of_next) | (lane == BLOCK - 1) | fits)
    count = tl.sum(goes_on.to(tl.int32), 0)
    places = tl.sort(tl.where(goes_on, (key & (BLOCK - 1)).to(tl.int32), BLOCK))
    ids += b * (PREFIX + K)
    tl.store(ids + PREFIX + lane, (places + PREFIX).to(tl.int64), mask=lane < count)
    slot = tl.arange(0, SLOTS)
    around = (slot < PREFIX) | (slot >= PREFIX + count)
    tl.store(ids + slot, tl.where(slot < PREFIX, slot, 0).to(tl.int64), mask=around & (slot < PREFIX + K))
    tl.store(kept + b * (PREFIX + K) + slot, slot < PREFIX + count, mask=slot < PREFIX + K)


def why_not(scores: Tensor, slots: int) -> str | None:
    """The reason why the kernel cannot fill so many slots by these scores, or None where it can."""
    if scores.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"scores are on {scores.device.type}, not on a CUDA device"
    if scores.shape[1] > MOST or slots > MOST:
        return f"it takes {MOST} tokens and slots at most"
    return None


@torch.library.custom_op("narrows::inverse_transform_sample", mutates_args=())
def _inverse_transform_sample(
    scores: Tensor, mask: Tensor | None, num_samples: int, sample_always: bool, prefix: int
) -> tuple[Tensor, Tensor]:
    (batch, num_tokens), slots = scores.shape, prefix + num_samples
    ids = scores.new_empty(batch, slots, dtype=torch.long)
    kept = scores.new_empty(batch, slots, dtype=torch.bool)
    if batch:
        strides = (*scores.stride(), *((0, 0) if mask is None else mask.stride()))
        block = max(16, triton.next_power_of_2(num_tokens))
        with torch.cuda.device_of(scores):
            _sample[(batch,)](
                scores, mask, ids, kept, num_tokens, num_samples, *strides,
                SAMPLE_ALWAYS=sample_always, PREFIX=prefix, GREATEST=torch.finfo(scores.dtype).max,
                BLOCK=block, SLOTS=triton.next_power_of_2(slots), num_warps=num_warps(block),
            )  # fmt: skip
    return ids, kept


@_inverse_transform_sample.register_fake
def _(scores: Tensor, _: Tensor | None, num_samples: int, _always: bool, prefix: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[0], prefix + num_samples
    return scores.new_empty(shape, dtype=torch.long), scores.new_empty(shape, dtype=torch.bool)


@register_flop_formula(torch.ops.narrows.inverse_transform_sample)
def _no_products(*_: object, **__: object) -> int:
    return 0


def num_warps(block: int) -> int:
    """Of a program that sorts so many numbers."""
    return min(16, max(1, block // 128))


def inverse_transform_sample(
    scores: Tensor, num_samples: int, mask: Tensor | None, sample_always: bool, prefix: int
) -> TokenSample:
    """As `fast.inverse_transform_sample`, for what `why_not` has no reason against."""
    return TokenSample(*_inverse_transform_sample(scores, mask, num_samples, sample_always, prefix))
