"""Pictures as tensors: converted from what people have, and painted on."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument, InvalidType
from narrows.visualize.canvas import to_rgb

LAYOUTS = "a tensor [3|1, H, W], an array [H, W] or [H, W, 3|1], or a PIL image"


def to_image(image: object, *, name: str = "image") -> Float[Tensor, "3 H W"]:
    """A picture as a float tensor `[3, H, W]` in 0..1.

    Args:
        image: a tensor `[3|1, H, W]`, an array `[H, W]` or `[H, W, 3|1]` (floats in 0..1 or unsigned bytes), or a PIL
            image.
        name: of the picture, for errors.
    """
    if hasattr(image, "convert") and hasattr(image, "tobytes"):
        pixels = _from_pil(image)
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu()
    elif hasattr(image, "__array__"):
        array = torch.as_tensor(image)
        pixels = array[None] if array.ndim == 2 else array.movedim(-1, 0)
    else:
        raise InvalidType(name, expected=LAYOUTS, got=type(image).__name__)
    given = tuple(getattr(image, "shape", pixels.shape))
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise InvalidArgument(name, expected=LAYOUTS, got=f"shape {given}")
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    if not torch.is_floating_point(pixels):
        raise InvalidType(name, expected="floats in 0..1 or unsigned bytes", got=f"dtype {pixels.dtype}")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InvalidArgument(
            name,
            expected="values in 0..1",
            got=f"values in {low:.3g}..{high:.3g}",
            hint="Undo the normalisation first: pixels * std + mean.",
        )
    return pixels.float().clamp(0, 1).expand(3, -1, -1)


def _from_pil(image: Any) -> Tensor:
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).movedim(-1, 0)


LONGEST_SIDE = 448
_DROPPED = to_rgb("#3d434c")
_OUTLINE = to_rgb("#ffffff")


def fit(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 height width"]:
    """The image resized to `LONGEST_SIDE`; small images keep visible pixels."""
    scale = LONGEST_SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    if scale > 2:
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def paint_weights(canvas: Float[Tensor, "3 H W"], weights: Float[Tensor, "h w"], colour: str) -> Float[Tensor, "3 H W"]:
    """The image in grey, tinted with `colour` in proportion to `weights` over their maximum."""
    alpha = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    alpha = F.interpolate(alpha[None, None], canvas.shape[1:], mode="bilinear")[0]
    return torch.lerp(_faded(canvas), _tinted(canvas, to_rgb(colour)[:, None, None]), alpha)


def paint_owners(
    canvas: Float[Tensor, "3 H W"], owner: Int[Tensor, "h w"], colours: dict[int, str]
) -> Float[Tensor, "3 H W"]:
    """The image with each token tinted by its owner (grey where `colours` has none), and outlines between owners."""
    labels = _enlarged(owner, canvas)
    painted = _faded(canvas)
    for carrier, colour in colours.items():
        painted = torch.where(labels == carrier, _tinted(canvas, to_rgb(colour)[:, None, None]), painted)
    return torch.where(_outlines(labels), _OUTLINE[:, None, None], painted)


def paint_means(canvas: Float[Tensor, "3 H W"], owner: Int[Tensor, "h w"]) -> Float[Tensor, "3 H W"]:
    """Every token in the mean colour of the tokens that share its owner, and outlines between owners.

    Tokens without an owner (negative) are grey and dim.
    """
    labels = _enlarged(owner, canvas)
    index = (labels + 1).clamp(min=0).flatten()  # 0: nobody
    pixels = canvas.flatten(1).double()
    sums = pixels.new_zeros(3, int(index.max()) + 1).index_add_(1, index, pixels)
    means = (sums / index.bincount().clamp(min=1))[:, index].view_as(canvas).to(canvas.dtype)
    painted = torch.where(labels < 0, _dimmed(canvas), means)
    return torch.where(_outlines(labels), _OUTLINE[:, None, None], painted)


def paint_kept(canvas: Float[Tensor, "3 H W"], keep: Bool[Tensor, "h w"]) -> Float[Tensor, "3 H W"]:
    """The image with dropped tokens grey and dim, and an outline around kept ones."""
    labels = _enlarged(keep.long(), canvas)
    painted = torch.where(labels == 1, canvas, _dimmed(canvas))
    return torch.where(_outlines(labels), _OUTLINE[:, None, None], painted)


def _grey(canvas: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    red, green, blue = canvas
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand(3, -1, -1)


def _dimmed(canvas: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    return torch.lerp(_grey(canvas), _DROPPED[:, None, None], 0.75)


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
