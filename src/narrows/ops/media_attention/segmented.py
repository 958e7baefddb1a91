r"""Text attending to the few media it sees, at most W of M: T x M scores, most of them masked, are never computed.

The text is sorted by the last medium it sees and cut into blocks of c rows, every block within one medium:

    last medium   1           2      3
    rows          a b c d e   f      g h i      (sorted)
    blocks        [a b c] [d e ·] [f · ·] [g h i]

Each block then attends to the W N latents of its medium and the W - 1 before it, all blocks as one batch. A medium read
by l rows takes ceil(l / c) blocks, so that G = floor((T + M (c - 1)) / c) blocks suffice whatever the segments are: the
shapes follow from T, N, M and W alone, nothing is read back from the device, and one graph serves every layout.

A block taller than its segment is filled up with padding, up to M c rows in all; a flatter one gathers the latents of
its medium once more, W N T / c in all, keys and values. Their sum is least at c = sqrt(2 W N T / M). With that, and no
more than ceil(T / M), rows are gathered at most twice, hence O(T N W) operations and O(T + M N W) memory where the
dense form has O(T M N) of both.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from narrows.errors import ImplementationUnavailable
from narrows.ops.attention import attention
from narrows.ops.media_attention.common import VisibleMedia, checkpointed


class _Blocks(NamedTuple):
    """Where every row stands and what every block reads.

    Args:
        slot: `[B * T]`, the place of a row among the `B * G * c` places; one more, the last, for rows that see nothing.
        medium: `[B, G]`, the last medium of a block, counted from 0.
        rows: c, rows to a block.
    """

    slot: Int[Tensor, " BT"]
    medium: Int[Tensor, "B G"]
    rows: int


def segmented(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M N"] | None,
) -> Float[Tensor, "B T H E"]:
    """The reference for text that sees few media, and is scored against the latents of few others."""
    if visible is None or visible.most is None:
        raise ImplementationUnavailable(
            "media_attention: impl='segmented' cannot run here: it needs a bound on how many media a text token sees, "
            f"as LastMedium and LastMedia give; got {visible if visible is None else 'most=None'}. "
            "Use impl='fused' or impl='auto'."
        )
    num_media = key.shape[1]
    seen = visible.any(num_media, mask)
    medium = (visible.last.long() - 1).clamp(0, num_media - 1)
    width = min(visible.most, num_media)
    blocks = _cut(torch.where(seen, medium, num_media), num_media, width * key.shape[2])
    # Padded rows and gathered latents are cheap to compute again and, kept for backward, would outweigh all the rest.
    return checkpointed(_attend, query, key, value, mask, blocks, visible.first, width)


def _cut(medium: Int[Tensor, "B T"], num_media: int, num_latents: int) -> _Blocks:
    """Cut rows into blocks that read `num_latents`; `medium` is `num_media` where a row sees nothing."""
    batch, length = medium.shape
    # torch.export cannot reason about T / M where it leaves either open. Any height is right; 64 suits usual segments.
    rows = 64
    if all(isinstance(size, int) for size in (length, num_media, num_latents)):
        rows = max(1, min(-(-length // num_media), int(math.sqrt(2 * num_latents * length / num_media))))
    num_blocks = (length + num_media * (rows - 1)) // rows

    medium, order = medium.sort(dim=1, stable=True)
    media = torch.arange(num_media, device=medium.device).expand(batch, num_media).contiguous()
    ends = torch.searchsorted(medium, media, right=True)
    starts = pad(ends, (1, 0))
    last_blocks = ((ends - starts[:, :-1] + rows - 1) // rows).cumsum(1)
    first_blocks = pad(last_blocks, (1, 0))

    rank = torch.arange(length, device=medium.device) - starts.gather(1, medium)
    sample = torch.arange(batch, device=medium.device)[:, None]
    slot = (sample * num_blocks + first_blocks.gather(1, medium)) * rows + rank
    slot = torch.where(medium < num_media, slot, batch * num_blocks * rows)
    slot = torch.empty_like(slot).scatter(1, order, slot)

    block = torch.arange(num_blocks, device=medium.device).expand(batch, num_blocks).contiguous()
    # Spare blocks read the last medium; all of their rows are padding.
    block_medium = torch.searchsorted(last_blocks, block, right=True).clamp(max=num_media - 1)
    return _Blocks(slot.flatten(), block_medium, rows)


def _attend(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    mask: Bool[Tensor, "B M N"] | None,
    blocks: _Blocks,
    first: Int[Tensor, "B T"],
    width: int,
) -> Float[Tensor, "B T H E"]:
    """What every row reads of the `width` media of its block."""
    batch, num_media, num_latents = key.shape[:3]
    slot, rows, num_blocks = blocks.slot, blocks.rows, blocks.medium.numel()
    window = blocks.medium.flatten()[:, None] + torch.arange(1 - width, 1, device=slot.device)  # [BG, W]
    sample = torch.arange(batch, device=slot.device).repeat_interleave(blocks.medium.shape[1])[:, None]
    chosen = (sample * num_media + window.clamp(min=0)).flatten()

    def of_blocks(latents: Tensor) -> Tensor:
        return latents.flatten(0, 1).index_select(0, chosen).unflatten(0, (num_blocks, width)).flatten(1, 2)

    visible = None
    if width > 1:
        # Rows of one block may begin at different media; the window of a block at the first media reaches before them.
        begin = (
            first.new_zeros(num_blocks * rows + 1).index_copy(0, slot, first.flatten())[:-1].view(num_blocks, rows, 1)
        )
        visible = ((window + 1)[:, None] >= begin.clamp(min=1)).repeat_interleave(num_latents, dim=-1)
    if mask is not None:
        latents = of_blocks(mask)[:, None]
        visible = latents if visible is None else visible & latents
    if visible is not None:
        # A place that sees nothing holds padding: it reads all, so as to stay finite.
        visible = (visible | ~visible.any(-1, keepdim=True))[:, None]
    num_places, length = num_blocks * rows, slot.numel()
    places = query.new_zeros(num_places + 1, *query.shape[2:]).index_copy(0, slot, query.flatten(0, 1))
    queries = places[:-1].unflatten(0, (num_blocks, rows)).transpose(1, 2)
    keys, values = (of_blocks(latents).transpose(1, 2) for latents in (key, value))
    read = attention(queries, keys, values, visible).transpose(1, 2).flatten(0, 1)
    # Back to the rows of text, and one row more for what padding reads. Every row is written once at most: the gradient
    # is a copy, where that of `read.index_select(0, slot)` would be a sum. Rows that see nothing stay 0.
    row = slot.new_full((num_places + 1,), length).index_copy(0, slot, torch.arange(length, device=slot.device))[:-1]
    return read.new_zeros(length + 1, *query.shape[2:]).index_copy(0, row, read)[:-1].view_as(query)
