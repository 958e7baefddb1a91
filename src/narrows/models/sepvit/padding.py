"""Feature maps of images that do not fill their canvas."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def without_padding(
    tokens: Float[Tensor, "B *layout D"], mask: Bool[Tensor, "B *layout"] | None
) -> Float[Tensor, "B *layout D"]:
    """The tokens, zero where `mask` is False."""
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0)


def tokens_of(mask: Bool[Tensor, "B H W"] | None, reduction: int) -> Bool[Tensor, "B h w"] | None:
    """Which tokens of a grid are real: those whose convolutions are centred on a real pixel."""
    return None if mask is None else mask[:, ::reduction, ::reduction]


def pool(features: Float[Tensor, "B h w D"], mask: Bool[Tensor, "B h w"] | None, pooling: str) -> Tensor:
    """The "avg" or "max" over the real tokens of a map, `[B, D]`, or for "" the map; zeros where no token is real."""
    if not pooling:
        return features
    if mask is None:
        return features.mean((1, 2)) if pooling == "avg" else features.amax((1, 2))
    count = mask.sum((1, 2)).unsqueeze(-1)
    if pooling == "avg":
        return without_padding(features, mask).sum((1, 2)) / count.clamp_min(1)
    highest = features.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax((1, 2))
    return highest.masked_fill(count == 0, 0)
