"""Text attending to one medium each, where text of the same medium stands together: no row moves, nothing is masked.

All text of a batch, one row after another, is cut where the medium changes, and each piece attends to the latents of
its medium, which lie in the same order:

    medium     · 1 1 1 2 4 | 1 1 2 3 · ·     (two texts; · sees none)
    pieces    [1 1 1 1|2|4] [1 1|2|3 3 3]    (3 of the first and 4 of the second have none)

Text that sees nothing reads the medium beside it, so that every row has keys, and is emptied afterwards. Where single
latents are masked, the others move together: pieces of latents have any length, too.
"""

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn.functional import pad

from narrows.errors import ImplementationUnavailable
from narrows.ops.attention import varlen_attention, why_not_varlen
from narrows.ops.media_attention.common import VisibleMedia


def varlen(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B T H E"]:
    """The reference in one kernel for sequences of different lengths."""
    if reason := why_not(query, key, value, visible):
        raise ImplementationUnavailable(
            f"media_attention: impl='varlen' cannot run here: {reason}. Use impl='segmented', 'fused' or 'auto'."
        )
    assert visible is not None
    (batch, num_media, num_latents), length = key.shape[:3], query.shape[1]
    keys, values = key.flatten(0, 2), value.flatten(0, 2)
    # The values of a masked medium are 0, and so is what its text reads.
    if mask is None or mask.ndim == 2:
        starts = torch.arange(0, len(keys) + 1, num_latents, dtype=torch.int32, device=query.device)
    else:
        starts, order = _real_latents(mask)
        keys, values = keys.index_select(0, order), values.index_select(0, order)
    read = varlen_attention(
        query.flatten(0, 1),
        keys,
        values,
        text_starts(visible, batch, num_media),
        starts,
        length,
        num_latents,
    )
    return read.view_as(query).masked_fill(visible.blind(num_media)[..., None, None], 0.0)


def text_starts(visible: VisibleMedia, batch: int, num_media: int) -> Int32[Tensor, " starts"]:
    """Where the text of each medium of the batch begins among all rows, and their number: `[B * M + 1]`."""
    # The media of a batch have numbers from 0, M to a sample.
    offsets = torch.arange(0, batch * num_media, num_media, device=visible.last.device)
    medium = visible.last.clamp(1, num_media) + offsets[:, None]
    number = torch.arange(1, batch * num_media + 2, device=visible.last.device)
    return torch.searchsorted(medium.flatten(), number, out_int32=True)


def _real_latents(mask: Bool[Tensor, "B M N"]) -> tuple[Int32[Tensor, " starts"], Int64[Tensor, " BMN"]]:
    """Where the real latents of each medium begin once they stand together, `[B * M + 1]`; their order, others last.

    A medium without any keeps all of its latents: text that reads it needs keys.
    """
    kept = (mask | ~mask.any(-1, keepdim=True)).flatten(0, 1).int()
    starts = pad(kept.sum(-1).cumsum(0, dtype=torch.int32), (1, 0))
    return starts, kept.flatten().argsort(descending=True, stable=True)


def why_not(query: Tensor, key: Tensor, value: Tensor, visible: VisibleMedia | None) -> str | None:
    """Why this form cannot run, or None where it can."""
    if visible is None or visible.most != 1 or not visible.ordered:
        return "it needs text that sees one medium at most, in order, as LastMedium gives"
    if not query.numel():
        return "it needs text"
    return why_not_varlen(query, key, value)
