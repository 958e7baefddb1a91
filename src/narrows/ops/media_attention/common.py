"""What several implementations share: which media each text token sees, and how rows attend."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from narrows.ops.attention import attention
from narrows.precision import at_least_float32


class VisibleMedia(NamedTuple):
    """The media of its row that each text token sees: numbers `first` to `last`, counted from 1.

    Every policy (`Attend`) gives this, and every implementation of `media_attention` takes it. A token sees none where
    `last < first`. Numbers beyond the media that are given, 0 among them, stand for media that are not there.

    Args:
        first: `[B, T]` integers.
        last: `[B, T]` integers.
        most: no token sees more media than this; None: no bound is known.
        ordered: whether `last` never falls along a row, so that text that reads the same medium stands together; every
            policy of this package gives such rows. It is not checked.
    """

    first: Int[Tensor, "B T"]
    last: Int[Tensor, "B T"]
    most: int | None = None
    ordered: bool = False

    def rows(self, start: int, stop: int) -> "VisibleMedia":
        """What the tokens from `start` to before `stop` see."""
        return self._replace(first=self.first[:, start:stop], last=self.last[:, start:stop])

    def media(self, num_media: int) -> Bool[Tensor, "B T M"]:
        """The same as a mask over M media."""
        number = torch.arange(1, num_media + 1, device=self.first.device)
        return (self.first[..., None] <= number) & (number <= self.last[..., None])

    def blind(self, num_media: int) -> Bool[Tensor, "B T"]:
        """Which tokens see none of M media."""
        if self.first is self.last and num_media > 0:
            return self.last.clamp(1, num_media) != self.last
        return self.first.clamp(min=1) > self.last.clamp(max=num_media)

    def any(self, num_media: int, mask: Bool[Tensor, "B M *N"] | None = None) -> Bool[Tensor, "B T"]:
        """Which tokens see a latent at all, of M media with this mask; needs no T x M memory."""
        if mask is None:
            return ~self.blind(num_media)
        there = mask if mask.ndim == 2 else mask.any(-1)
        before = pad(there.cumsum(-1), (1, 0))
        last, first = self.last.clamp(0, num_media).long(), (self.first - 1).clamp(0, num_media).long()
        return before.gather(1, last) > before.gather(1, first)


def latents_mask(mask: Bool[Tensor, "B M *N"], key: Float[Tensor, "B M N H E"]) -> Bool[Tensor, "B M N"]:
    """A mask of media, `[B, M]`, or of their latents, as the latter."""
    return mask[..., None].expand(key.shape[:3]) if mask.ndim == 2 else mask


def visible_latents(
    key: Float[Tensor, "B M N H E"], visible: VisibleMedia | None, mask: Bool[Tensor, "B M *N"] | None
) -> Bool[Tensor, "B _ M N"]:
    """Which latents of which media a text token sees, `[B, T, M, N]`; where all see all, `[B, 1, M, N]`."""
    if visible is None:
        return (key.new_ones(key.shape[:3], dtype=torch.bool) if mask is None else latents_mask(mask, key))[:, None]
    media = visible.media(key.shape[1])[..., None]
    return media.expand(-1, -1, -1, key.shape[2]) if mask is None else media & latents_mask(mask, key)[:, None]


def attend_rows(
    query: Float[Tensor, "B Q H E"],
    key: Float[Tensor, "B K H E"],
    value: Float[Tensor, "B K H E"],
    mask: Bool[Tensor, "B _ _ K"] | None = None,
) -> Float[Tensor, "B Q H E"]:
    """Fused attention of rows before heads."""
    query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
    return attention(query, key, value, mask).transpose(1, 2)


def emptied(
    read: Float[Tensor, "B T H E"],
    query: Float[Tensor, "B T H E"],
    nothing: Bool[Tensor, "B _"] | None,
    *,
    masked: bool,
) -> Float[Tensor, "B T H E"]:
    """What text read, 0 where it sees nothing; `masked`: whether it was read by attention with a mask.

    On a CPU PyTorch's kernel without one reads 0 for a query that is not finite, which would hide it.
    """
    nothing = None if nothing is None else nothing[..., None, None]
    if masked or query.device.type != "cpu":
        return read if nothing is None else read.masked_fill(nothing, 0.0)
    broken = 0.0 * at_least_float32(query.detach()).sum(-1, keepdim=True)  # 0, or NaN
    if nothing is not None:
        broken = broken.masked_fill(nothing, 0.0)
    replaced = broken.isnan() if nothing is None else broken.isnan() | nothing
    return torch.where(replaced, broken.to(read.dtype), read)
