r"""Text attending to the few media it sees, at most W of M: T x M scores, most of them masked, are never computed.

The rows of all texts, one after another, ordered by the last medium they see, are cut into tiles of c rows. Where a row
of tile i sees medium m, the two make a pair, and all rows of the tile attend to the W N latents of that medium and the
W - 1 before it; a row then takes what the pair of its own medium read:

    last medium   1 1 1 1 | 1 2 3 3 | 3 3 3 5
    tiles         0         1         2
    pairs         (0,1)     (1,1) (1,2) (1,3)     (2,3) (2,5)

From one row to the next neither tile nor medium falls, so that i + m numbers the pairs: I tiles and M media have
I + M - 1 of them at most, whatever the rows are. The shapes follow from T, N, M and W alone, nothing is read back from
the device, and one graph serves every layout.

Higher tiles read more rows for nothing, M c in all; flatter ones gather the latents of a medium more often, W N T / c
of them in all, keys and values. Their sum is least at c = sqrt(2 W N T / M). With that, and no more than ceil(T / M),
rows are read at most twice: O(T N W) operations and O(T + M N W) memory where the dense form has O(T M N) of both.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from narrows.errors import ImplementationUnavailable
from narrows.ops.media_attention.common import VisibleMedia, attend_rows, emptied, latents_mask
from narrows.ops.recomputation import checkpointed


def segmented(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B T H E"]:
    """The reference for text that sees few media, and is scored against the latents of few others."""
    if visible is None or visible.most is None:
        raise ImplementationUnavailable(
            "media_attention: impl='segmented' cannot run here: it needs a bound on how many media a text token sees, "
            f"as LastMedium and LastMedia give; got {visible if visible is None else 'most=None'}. "
            "Use impl='fused' or impl='auto'."
        )
    if query.shape[0] == 0 or query.shape[1] == 0:
        return query.clone()  # nothing, in a graph that backward passes through
    (batch, num_media, num_latents), device = key.shape[:3], query.device
    width = min(visible.most, num_media)
    if width == 1 and mask is not None and mask.ndim == 2:
        mask = None  # The values of a masked medium are 0, and so is what its text reads.
    nothing = visible.blind(num_media) if mask is None else ~visible.any(num_media, mask)
    height = _height(query.shape[1], num_media, width * num_latents)

    # The media of a batch have numbers from 0, M to a sample. Text that sees nothing reads the medium beside it.
    offsets = torch.arange(-1, batch * num_media - 1, num_media, device=device)
    medium = (visible.last.clamp(1, num_media) + offsets[:, None]).flatten()
    order = None
    if not visible.ordered:
        medium, order = medium.sort(stable=True)
    row = torch.arange(query.shape[0] * query.shape[1], device=device)
    number = torch.arange((row.shape[0] + height - 1) // height + batch * num_media - 1, device=device)
    # The tile of each pair is that of the first row that has this pair or a later one.
    tile = torch.searchsorted((medium + row // height)[:-1], number) // height
    place = torch.add(row, medium, alpha=height)
    if order is not None:
        place, order = torch.empty_like(place).scatter(0, order, place), order.int()
    # Rows and latents are cheap to gather again and, kept for backward, would outweigh all the rest.
    first = visible.first if width > 1 else None
    read = checkpointed(_attend, query, key, value, mask, first, order, tile, number - tile, place, height, width)
    return emptied(read, query, nothing, masked=mask is not None or width > 1)


def _height(length: int, num_media: int, num_latents: int) -> int:
    """Rows of a tile. Any number is right; of lengths that torch.export leaves open nothing can be reckoned."""
    if not all(isinstance(size, int) for size in (length, num_media, num_latents)):
        return 64
    return max(1, min(-(-length // num_media), int(math.sqrt(2 * num_latents * length / num_media))))


def _attend(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    mask: Bool[Tensor, "B M *N"] | None,
    first: Int[Tensor, "B T"] | None,
    order: Int[Tensor, " BT"] | None,
    tile: Int[Tensor, " pairs"],
    medium: Int[Tensor, " pairs"],
    place: Int[Tensor, " BT"],
    height: int,
    width: int,
) -> Float[Tensor, "B T H E"]:
    """What every row reads of the `width` media of its pair, the last of which is `medium`."""
    num_media, num_latents = key.shape[1:3]

    def of_tiles(of_rows: Tensor) -> Tensor:
        """Of each pair the rows of its tile, `[pairs, height, ...]`."""
        of_rows = of_rows.flatten(0, 1) if order is None else of_rows.flatten(0, 1).index_select(0, order)
        length = of_rows.shape[0]
        if torch.compiler.is_compiling():
            # A length that a compiler leaves open cannot be divided into tiles, or not for all lengths in one graph.
            row = tile[:, None] * height + torch.arange(height, device=tile.device)
            return of_rows[row.clamp(max=length - 1)]
        if spare := -length % height:
            of_rows = pad(of_rows, (*(0, 0) * (of_rows.ndim - 1), 0, spare))
        return of_rows.unflatten(0, (-1, height)).index_select(0, tile)

    chosen, seen = medium, None
    if width > 1:
        assert first is not None
        # Media of the sample that a pair reads, from 0; the window of one at the first media reaches before them.
        window = (medium % num_media)[:, None] + torch.arange(1 - width, 1, device=medium.device)
        chosen = (window.clamp(min=0) + (medium - medium % num_media)[:, None]).flatten()
        seen = (window + 1)[:, None] >= of_tiles(first).clamp(min=1)[..., None]
        seen = seen.repeat_interleave(num_latents, dim=-1)

    def of_media(latents: Tensor) -> Tensor:
        """Of each pair the latents of its media, `[pairs, width * N, ...]`."""
        return latents.flatten(0, 1).index_select(0, chosen).unflatten(0, (-1, width)).flatten(1, 2)

    if mask is not None:
        there = of_media(latents_mask(mask, key))[:, None]
        seen = there if seen is None else seen & there
    if seen is not None:
        # A row that sees nothing here, another's or padding, reads all, so as to stay finite.
        seen = (seen | ~seen.any(-1, keepdim=True))[:, None]
    read = attend_rows(of_tiles(query), of_media(key), of_media(value), seen)
    return read.flatten(0, 1).index_select(0, place).view_as(query)
