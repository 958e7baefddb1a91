"""Which media each text token sees: the result of every policy, and what attention goes by."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad


class VisibleMedia(NamedTuple):
    """The media of its row that each text token sees: numbers `first` to `last`, counted from 1.

    A token sees none where `last < first`. Numbers without a medium, 0 among them, are of media that are not there.

    Args:
        first: `[B, T]` integers.
        last: `[B, T]` integers.
        most: no token sees more media than this; None: no bound is known.
    """

    first: Int[Tensor, "B T"]
    last: Int[Tensor, "B T"]
    most: int | None = None

    def rows(self, start: int, stop: int) -> "VisibleMedia":
        """What the tokens from `start` to before `stop` see."""
        return VisibleMedia(self.first[:, start:stop], self.last[:, start:stop], self.most)

    def media(self, num_media: int) -> Bool[Tensor, "B T M"]:
        """The same written out, for M media."""
        number = torch.arange(1, num_media + 1, device=self.first.device)
        return (self.first[..., None] <= number) & (number <= self.last[..., None])

    def any(self, num_media: int, mask: Bool[Tensor, "B M N"] | None = None) -> Bool[Tensor, "B T"]:
        """Which tokens see a latent at all, of M media with this mask of their latents; needs no T x M memory."""
        there = mask.any(-1) if mask is not None else self.first.new_ones(self.first.shape[0], num_media)
        before = pad(there.cumsum(-1), (1, 0))
        last, first = self.last.clamp(0, num_media).long(), (self.first - 1).clamp(0, num_media).long()
        return before.gather(1, last) > before.gather(1, first)
