r"""Text attending to its own medium only: the T x M grid of which one column per row counts is never laid out.

The text is sorted by medium and cut into blocks of c rows, every block within one medium:

    medium      1           2      3
    rows        a b c d e   f      g h i      (sorted by medium)
    blocks      [a b c] [d e ·] [f · ·] [g h i]

Each block then attends to the N latents of its medium, all blocks as one batch. A medium read by l rows takes
ceil(l / c) blocks, so that G = floor((T + M (c - 1)) / c) blocks suffice whatever the segments are: the shapes
follow from T and M alone, nothing is read back from the device, and one graph serves every layout. With
c = ceil(T / M) rows and latents are each gathered at most twice, hence O(T N) operations and O(T + M N) memory where
the dense form has O(T M N) of both.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from narrows.errors import ImplementationUnavailable


class _Blocks(NamedTuple):
    """Where every row stands and what every block reads.

    Args:
        slot: `[B * T]`, the place of a row among the `B * G * c` places; one more, the last, for rows that see nothing.
        medium: `[B * G]`, the medium of a block among the `B * M`.
        rows: c, rows to a block.
    """

    slot: Int[Tensor, " BT"]
    medium: Int[Tensor, " BG"]
    rows: int


def segmented(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    text_time: Int[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B M N"] | None,
    *,
    attend: str,
) -> Float[Tensor, "B T H E"]:
    """The reference for attend="last", where each row meets the latents of its own medium and no others."""
    if attend != "last" or text_time is None:
        raise ImplementationUnavailable(
            "media_attention: impl='segmented' cannot run here: it gives each text token one medium, that is, "
            f"attend='last' and text_time given; got attend={attend!r}, text_time {'not ' * (text_time is None)}given. "
            "Use impl='fused' or impl='auto'."
        )
    num_media = key.shape[1]
    seen = (text_time >= 1) & (text_time <= num_media)
    medium = (text_time.long() - 1).clamp(0, num_media - 1)
    if mask is not None:
        seen = seen & mask.any(-1).gather(1, medium)
    blocks = _cut(torch.where(seen, medium, num_media), num_media)
    # Padded rows and gathered latents are cheap to make again and, kept for backward, would outweigh all the rest.
    read = checkpoint(
        _attend,
        query,
        key,
        value,
        mask,
        *blocks,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",
    )
    return torch.where(seen[..., None, None], read, 0.0)


def _cut(medium: Int[Tensor, "B T"], num_media: int) -> _Blocks:
    """Cut rows into blocks within one medium; `medium` is `num_media` where a row sees nothing."""
    batch, length = medium.shape
    # torch.export cannot reason about T / M where it leaves either open: a block as tall as a usual medium serves then.
    known = isinstance(length, int) and isinstance(num_media, int)
    rows = max(1, -(-length // num_media)) if known else 64
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
    return _Blocks(slot.flatten(), (sample * num_media + block_medium).flatten(), rows)


def _attend(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    mask: Bool[Tensor, "B M N"] | None,
    slot: Int[Tensor, " BT"],
    medium: Int[Tensor, " BG"],
    rows: int,
) -> Float[Tensor, "B T H E"]:
    num_blocks, heads, width = medium.shape[0], *query.shape[2:]
    places = query.new_zeros(num_blocks * rows + 1, heads, width).index_copy(0, slot, query.flatten(0, 1))
    key, value = (latents.flatten(0, 1).index_select(0, medium).transpose(1, 2) for latents in (key, value))
    visible = None
    if mask is not None:
        visible = mask.flatten(0, 1).index_select(0, medium)[:, None, None]
        # A block of a wholly masked medium holds no row that is looked at, and must only stay finite.
        visible = visible | ~visible.any(-1, keepdim=True)
    blocks = places[:-1].view(num_blocks, rows, heads, width).transpose(1, 2)
    read = scaled_dot_product_attention(blocks, key, value, attn_mask=visible).transpose(1, 2)
    read = read.reshape(num_blocks * rows, heads, width)
    return read.index_select(0, slot.clamp(max=num_blocks * rows - 1)).view_as(query)
