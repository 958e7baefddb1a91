"""Whatever people hold a picture in, as one tensor."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType

LAYOUTS = "a tensor [3|1, H, W], an array [H, W] or [H, W, 3|1], or a PIL image"


def to_image(image: object, *, name: str = "image") -> Float[Tensor, "3 H W"]:
    """A picture as a float tensor `[3, H, W]` in 0..1.

    Args:
        image: a tensor `[3|1, H, W]`, an array `[H, W]` or `[H, W, 3|1]` (floats in 0..1 or unsigned bytes), or a PIL
            image.
        name: what the picture is called in errors.
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
