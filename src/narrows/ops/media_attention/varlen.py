"""Text attending to one medium each, where text of the same medium stands together: no row moves, nothing is masked.

All text of a batch, one row after another, is cut where the medium changes, and each piece attends to the latents of
its medium, which lie in the same order:

    medium     · 1 1 1 2 4 | 1 1 2 3 · ·     (two texts; · sees none)
    pieces    [1 1 1 1|2|4] [1 1|2|3 3 3]    (3 of the first and 4 of the second have none)

Text that sees nothing reads the medium beside it, so that every row has keys, and is emptied afterwards.
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

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
    if reason := why_not(query, key, value, visible, mask):
        raise ImplementationUnavailable(
            f"media_attention: impl='varlen' cannot run here: {reason}. Use impl='segmented', 'fused' or 'auto'."
        )
    assert visible is not None
    (batch, num_media, num_latents), length = key.shape[:3], query.shape[1]
    starts = torch.arange(0, batch * num_media * num_latents + 1, num_latents, dtype=torch.int32, device=query.device)
    # The values of a masked medium are 0, and so is what its text reads.
    read = varlen_attention(
        query.flatten(0, 1),
        key.flatten(0, 2),
        value.flatten(0, 2),
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


def why_not(query: Tensor, key: Tensor, value: Tensor, visible: VisibleMedia | None, mask: Tensor | None) -> str | None:
    """Why this form cannot run, or None where it can."""
    if visible is None or visible.most != 1 or not visible.ordered:
        return "it needs text that sees one medium at most, in order, as LastMedium gives"
    if mask is not None and mask.ndim > 2:
        return "it takes masks of whole media, [B, M], and no others"
    if not query.numel():
        return "it needs text"
    return why_not_varlen(query, key, value)
