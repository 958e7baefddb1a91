"""Text attending to media through fused attention, some rows of text at a time: any policy.

The mask is made for the rows at hand, and again in the backward pass: no T x (M N) of it is ever kept.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from narrows.ops.media_attention.common import (
    VisibleMedia,
    attend_rows,
    emptied,
    latents_mask,
    visible_latents,
)
from narrows.ops.recomputation import checkpointed

# Rows of text that share a mask. A mask of 512 x M N bytes is in memory at a time: no more than the keys and values of
# as many latents, and yet so many rows that a product of them keeps a device busy.
ROWS = 512


def fused(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B T H E"]:
    """The reference through `scaled_dot_product_attention`, which keeps no scores."""
    length, num_media = query.shape[1], key.shape[1]
    if visible is None:
        return _read(query, key, value, None if mask is None else latents_mask(mask, key).flatten(1)[:, None])
    if isinstance(num_media, int) and num_media == 1 and (mask is None or mask.ndim == 2):
        # Text sees all of the only medium or nothing, and needs no mask. The values of a masked medium are 0.
        return _read(query, key, value, None, visible.blind(1))
    # torch.export cannot count the parts of a length it leaves open.
    if not isinstance(length, int) or length <= ROWS:
        return _attend(query, key, value, visible.first, visible.last, mask)
    rows = [
        [tensor[:, start : start + ROWS] for tensor in (query, visible.first, visible.last)]
        for start in range(0, length, ROWS)
    ]
    return torch.cat([checkpointed(_attend, query, key, value, *numbers, mask) for query, *numbers in rows], 1)


def _attend(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    first: Int[Tensor, "B T"],
    last: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B T H E"]:
    """What text reads of the media `first` to `last`."""
    return _read(query, key, value, visible_latents(key, VisibleMedia(first, last), mask).flatten(2))


def _read(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    seen: Bool[Tensor, "B _ S"] | None,
    nothing: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H E"]:
    """What text reads of the latents that it sees; of all of them, or of none, where `seen` is None."""
    mask = None
    if seen is not None:
        nothing = ~seen.any(-1)
        # A row without any visible latent attends to all, finite, and is emptied after it.
        mask = (seen | nothing[..., None])[:, None]
    read = attend_rows(query, key.flatten(1, 2), value.flatten(1, 2), mask)
    return emptied(read, query, nothing, masked=mask is not None)
