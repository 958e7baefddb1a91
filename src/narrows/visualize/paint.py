"""Tokens painted over an image: tensors in, tensors out."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from narrows.visualize.palette import to_rgb

LONGEST_SIDE = 448
_DROPPED = to_rgb("#3d434c")
_OUTLINE = to_rgb("#ffffff")


def fit(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 height width"]:
    """The image enlarged or reduced to `LONGEST_SIDE`; small ones keep their pixels visible."""
    scale = LONGEST_SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    if scale > 2:
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def over(canvas: Float[Tensor, "3 H W"], weights: Float[Tensor, "h w"], colour: str) -> Float[Tensor, "3 H W"]:
    """The image in grey and, where `weights` are large compared with their maximum, in `colour`."""
    alpha = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    alpha = F.interpolate(alpha[None, None], canvas.shape[1:], mode="bilinear")[0]
    return torch.lerp(_faded(canvas), _tinted(canvas, to_rgb(colour)[:, None, None]), alpha)


def owned(canvas: Float[Tensor, "3 H W"], owner: Int[Tensor, "h w"], colours: dict[int, str]) -> Float[Tensor, "3 H W"]:
    """Each token in the colour of its owner (grey where `colours` has none), owners outlined against each other."""
    labels = _enlarged(owner, canvas)
    painted = _faded(canvas)
    for carrier, colour in colours.items():
        painted = torch.where(labels == carrier, _tinted(canvas, to_rgb(colour)[:, None, None]), painted)
    return torch.where(_outlines(labels), _OUTLINE[:, None, None], painted)


def kept(canvas: Float[Tensor, "3 H W"], keep: Bool[Tensor, "h w"]) -> Float[Tensor, "3 H W"]:
    """Kept tokens as they are, dropped ones grey and dim, and an outline between them."""
    labels = _enlarged(keep.long(), canvas)
    dropped = torch.lerp(_grey(canvas), _DROPPED[:, None, None], 0.75)
    painted = torch.where(labels == 1, canvas, dropped)
    return torch.where(_outlines(labels), _OUTLINE[:, None, None], painted)


def _grey(canvas: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    red, green, blue = canvas
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand(3, -1, -1)


def _faded(canvas: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    return 0.1 + 0.6 * _grey(canvas)


def _tinted(canvas: Float[Tensor, "3 H W"], colour: Float[Tensor, "3 1 1"]) -> Float[Tensor, "3 H W"]:
    return colour * (0.45 + 0.35 * _grey(canvas)) + 0.2 * _grey(canvas)


def _enlarged(tokens: Int[Tensor, "h w"], canvas: Float[Tensor, "3 H W"]) -> Int[Tensor, "H W"]:
    return F.interpolate(tokens[None, None].double(), canvas.shape[1:], mode="nearest-exact")[0, 0].long()


def _outlines(labels: Int[Tensor, "H W"], width: int = 2) -> Bool[Tensor, "H W"]:
    """The pixels at most `width / 2` from another label."""
    values = labels[None, None].double()
    padded = F.pad(values, (width // 2, width // 2, width // 2, width // 2), mode="replicate")
    return (F.max_pool2d(padded, width + 1, 1) != -F.max_pool2d(-padded, width + 1, 1))[0, 0]
