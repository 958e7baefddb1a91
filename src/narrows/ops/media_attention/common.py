"""What several implementations share: which media each text token sees, and activation checkpointing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from narrows.precision import is_transformed


class VisibleMedia(NamedTuple):
    """The media of its row that each text token sees: numbers `first` to `last`, counted from 1.

    Every policy (`Attend`) gives this, and every implementation of `media_attention` takes it. A token sees none where
    `last < first`. Numbers beyond the media that are given, 0 among them, stand for media that are not there.

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
        """The same as a mask over M media."""
        number = torch.arange(1, num_media + 1, device=self.first.device)
        return (self.first[..., None] <= number) & (number <= self.last[..., None])

    def any(self, num_media: int, mask: Bool[Tensor, "B M N"] | None = None) -> Bool[Tensor, "B T"]:
        """Which tokens see a latent at all, of M media with this mask of their latents; needs no T x M memory."""
        there = mask.any(-1) if mask is not None else self.first.new_ones(self.first.shape[0], num_media)
        before = pad(there.cumsum(-1), (1, 0))
        last, first = self.last.clamp(0, num_media).long(), (self.first - 1).clamp(0, num_media).long()
        return before.gather(1, last) > before.gather(1, first)


def visible_latents(
    key: Float[Tensor, "B M N H E"], visible: VisibleMedia | None, mask: Bool[Tensor, "B M N"] | None
) -> Bool[Tensor, "B _ M N"]:
    """Which latents of which media a text token sees, `[B, T, M, N]`; where all see all, `[B, 1, M, N]`."""
    latents = (key.new_ones(key.shape[:3], dtype=torch.bool) if mask is None else mask)[:, None]
    return latents if visible is None else visible.media(key.shape[1])[..., None] & latents


def checkpointed(function: Callable[..., Tensor], query: Tensor, *args: Any) -> Tensor:
    """`function(query, *args)` with activation checkpointing: backward keeps the arguments and computes the rest again.

    Not inside a transformation of `torch.func`, which takes no hooks on saved tensors.
    """
    if is_transformed(query, *(argument for argument in args if isinstance(argument, Tensor))):
        return function(query, *args)
    result = checkpoint(function, query, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    assert isinstance(result, Tensor)
    return result
