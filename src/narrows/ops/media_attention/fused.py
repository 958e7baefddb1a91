"""Text attending to media through fused attention, some rows of text at a time: any policy.

The mask is made for the rows at hand, and again in the backward pass: no T x (M N) of it is ever kept.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.attention import attention
from narrows.ops.media_attention.common import VisibleMedia, checkpointed, visible_latents

# Rows of text that share a mask. A mask of 512 x M N bytes is in memory at a time: no more than the keys and values of
# as many latents, and yet so many rows that a product of them keeps a device busy.
ROWS = 512


def fused(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M N"] | None,
) -> Float[Tensor, "B T H E"]:
    """The reference through `scaled_dot_product_attention`, which keeps no scores."""
    length = query.shape[1]
    # torch.export cannot count the parts of a length it leaves open.
    if visible is None or not isinstance(length, int) or length <= ROWS:
        return _attend(query, key, value, visible, mask)
    starts = range(0, length, ROWS)
    parts = [(query[:, start : start + ROWS], key, value, visible.rows(start, start + ROWS), mask) for start in starts]
    return torch.cat([checkpointed(_attend, *part) for part in parts], 1)


def _attend(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M N"] | None,
) -> Float[Tensor, "B T H E"]:
    query = query.transpose(1, 2)
    keys, values = (latents.flatten(1, 2).transpose(1, 2) for latents in (key, value))
    if visible is None and mask is None:
        return attention(query, keys, values).transpose(1, 2)
    seen = visible_latents(key, visible, mask).flatten(2)
    something = seen.any(-1, keepdim=True)
    # A row without any visible latent attends to all, finite, and is emptied after it.
    read = attention(query, keys, values, (seen | ~something)[:, None])
    return torch.where(something[..., None], read.transpose(1, 2), 0.0)
