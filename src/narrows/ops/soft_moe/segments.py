"""Means of consecutive tokens, from which dynamic slots are made. Masked tokens are as if they were not there.

Sums are taken in float32 or better, means come in the dtype of the tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.precision import accumulation_dtype, at_least_float32, autocast_off
from narrows.validation import check_mask, check_positive, check_tokens


class Segments(NamedTuple):
    """The means of P segments.

    Args:
        means: `[B, P, D]`, 0 where there is no token to average.
        mask: `[B, P]`, False at segments without a token; None where every segment has one.
    """

    means: Tensor
    mask: Tensor | None


def _compacted(tokens: Tensor, mask: Tensor) -> Tensor:
    """The real tokens of each sample moved to the front in their order, zeros behind them."""
    real, order = mask.int().sort(dim=-1, descending=True, stable=True)
    moved = tokens.gather(1, order[..., None].expand_as(tokens))  # which keeps what it is given, and no copy of it
    return moved.masked_fill(real[..., None] == 0, 0)


def segments_of_length(
    tokens: Float[Tensor, "B N D"], length: int, mask: Bool[Tensor, "B N"] | None = None
) -> Segments:
    """Means of every `length` consecutive tokens, the last segment of what is left: `P = ceil(N / length)`.

    A sample with n real tokens fills `ceil(n / length)` segments, whatever the width it is padded to.
    """
    check_tokens("tokens", tokens)
    check_mask("mask", mask, tokens.shape[:2])
    check_positive(length=length)
    num_tokens, wide = tokens.shape[1], accumulation_dtype(tokens)
    if mask is None and not torch.compiler.is_compiling():  # whose graph fits every number of tokens
        whole = num_tokens - num_tokens % length
        means = tokens[:, :whole].unflatten(1, (-1, length)).mean(2, dtype=wide) if whole else tokens[:, :0].to(wide)
        if whole < num_tokens:
            means = torch.cat((means, tokens[:, whole:].mean(1, keepdim=True, dtype=wide)), 1)
        return Segments(means.to(tokens.dtype), None)
    count = (num_tokens + length - 1) // length
    tokens = tokens if mask is None else _compacted(tokens, mask)
    padded = F.pad(tokens, (0, 0, 0, length))[:, : count * length]  # More than 0, or it would be traced anew for 0.
    sums = padded.unflatten(1, (count, length)).sum(2, dtype=wide)
    starts = torch.arange(count, device=tokens.device) * length
    if mask is None:
        return Segments((sums / (num_tokens - starts).clamp(max=length)[:, None]).to(tokens.dtype), None)
    sizes = (mask.sum(-1, keepdim=True) - starts).clamp(0, length)
    return Segments((sums / sizes.clamp(min=1)[..., None]).to(tokens.dtype), sizes > 0)


def segments_in_number(tokens: Float[Tensor, "B N D"], count: int, mask: Bool[Tensor, "B N"] | None = None) -> Segments:
    """Means of `count` even segments: segment p takes tokens `floor(p n / P)` to `ceil((p + 1) n / P)` of n real ones.

    These are the windows of adaptive average pooling: neighbours share a token where n is no multiple of P, and no
    segment is empty, however few tokens there are.
    """
    check_tokens("tokens", tokens)
    check_mask("mask", mask, tokens.shape[:2])
    check_positive(count=count)
    mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    rank = (mask.cumsum(-1) - 1)[:, None]
    size = mask.sum(-1)[:, None, None]
    segment = torch.arange(count, device=tokens.device)[:, None]
    starts, ends = segment * size // count, ((segment + 1) * size + count - 1) // count
    inside = (rank >= starts) & (rank < ends) & mask[:, None]
    with autocast_off(tokens):
        wide = at_least_float32(tokens.masked_fill(~mask[..., None], 0))
        means = (inside.to(wide.dtype) @ wide) / (ends - starts).clamp(min=1)
    return Segments(means.to(tokens.dtype), None)
