"""Where objects are in a first frame, as what slots begin from: boxes and points."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_positive

HINTS = {"boxes": 4, "points": 2}
"""Numbers of a hint of each kind."""


def object_hints(
    labels: Int[Tensor, "B H W"], number: int, *, kind: str = "boxes"
) -> Float[Tensor, "B number coordinates"]:
    """A hint for each slot from the objects of an image or of the first frame of a clip (Kipf et al. 2022).

    Row 0 stands for the background and is 0. The rows after it are the objects that are seen, by ascending labels;
    where there are fewer they are 0 too, and where there are more the last are left out.

    Args:
        labels: the object of each pixel; 0 is the background, and what is negative counts for nothing.
        number: rows, K.
        kind: "boxes", (top, left, bottom, right), or "points", (down, right) of their middles; as shares of the image.

    Raises:
        InvalidArgument: an unknown kind, or labels of another shape.
    """
    check_choice("kind", kind, tuple(HINTS))
    check_positive(number=number)
    if labels.ndim != 3:
        raise InvalidArgument("labels", expected="shape [B, H, W]", got=tuple(labels.shape))
    hints = torch.zeros(len(labels), number, 4, device=labels.device)
    for sample, image in enumerate(labels):
        seen = image.unique()
        for row, label in enumerate(seen[seen > 0][: number - 1], start=1):
            inside = image == label
            sides = []
            for axis in (1, 0):
                places = inside.any(axis).nonzero()
                sides.append(torch.stack((places.min(), places.max() + 1)) / inside.shape[1 - axis])
            hints[sample, row] = torch.stack(sides, 1).flatten()
    return hints if kind == "boxes" else (hints[..., :2] + hints[..., 2:]) / 2
