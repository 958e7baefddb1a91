r"""Text attending to the few media it sees: the T x M grid, of which at most W columns a row count, is never laid out.

The text is sorted by the last medium it sees and cut into blocks of c rows, every block within one medium:

    last medium   1           2      3
    rows          a b c d e   f      g h i      (sorted)
    blocks        [a b c] [d e ·] [f · ·] [g h i]

Each block then attends to the W N latents of its medium and the W - 1 before it, all blocks as one batch. A medium read
by l rows takes ceil(l / c) blocks, so that G = floor((T + M (c - 1)) / c) blocks suffice whatever the segments are: the
shapes follow from T, N, M and W alone, nothing is read back from the device, and one graph serves every layout.

A block taller than its segment gathers rows that nobody reads, up to M c of them; a flatter one gathers the latents of
its medium once more, W N T / c in all, keys and values. Their sum is least at c = sqrt(2 W N T / M). With that, and no
more than ceil(T / M), rows are gathered at most twice, hence O(T N W) operations and O(T + M N W) memory where the
dense form has O(T M N) of both.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from narrows.errors import ImplementationUnavailable
from narrows.ops.media_attention.common import made_again
from narrows.ops.media_attention.visible import VisibleMedia


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
    """The reference where each row sees few media, and meets the latents of few others."""
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
    # Padded rows and gathered latents are cheap to make again and, kept for backward, would outweigh all the rest.
    read = made_again(_attend, query, key, value, mask, blocks, visible.first, width)
    return torch.where(seen[..., None, None], read, 0.0)


def _cut(medium: Int[Tensor, "B T"], num_media: int, num_latents: int) -> _Blocks:
    """Cut rows into blocks that read `num_latents`; `medium` is `num_media` where a row sees nothing."""
    batch, length = medium.shape
    # torch.export cannot reason about T / M where it leaves either open: a block as tall as a usual medium serves then.
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
    # Blocks to spare read the last medium; no row of theirs is ever looked at.
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
        # A place that sees nothing holds no row that is looked at, and must only stay finite.
        visible = (visible | ~visible.any(-1, keepdim=True))[:, None]
    places = query.new_zeros(num_blocks * rows + 1, *query.shape[2:]).index_copy(0, slot, query.flatten(0, 1))
    queries = places[:-1].unflatten(0, (num_blocks, rows)).transpose(1, 2)
    keys, values = (of_blocks(latents).transpose(1, 2) for latents in (key, value))
    read = scaled_dot_product_attention(queries, keys, values, attn_mask=visible).transpose(1, 2).flatten(0, 1)
    taken = _Taken.apply(read, slot)
    assert isinstance(taken, Tensor)
    return taken.view_as(query)


class _Taken(torch.autograd.Function):
    """The row of each slot, anything where the slot is beyond the last row.

    No two read the same row, so that the gradient is a copy, where that of `index_select` is a sum on a single thread.
    """

    @staticmethod
    def forward(rows: Tensor, slot: Tensor) -> Tensor:
        return rows.index_select(0, slot.clamp(max=rows.shape[0] - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        rows, slot = inputs
        ctx.num_rows = rows.shape[0]
        ctx.save_for_backward(slot)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), (slot,) = grad_outputs, ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows + 1, *grad.shape[1:]).index_copy(0, slot, grad)[:-1], None
