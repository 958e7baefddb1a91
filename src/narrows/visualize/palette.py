"""Colours that people with any colour vision can tell apart, and the inks of text and lines."""

import torch
from jaxtyping import Float
from torch import Tensor

# Okabe and Ito (2008), "Color Universal Design", without black, and a wine red as the eighth.
CARRIERS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#882255")
OTHER = "#a8adb5"
INK = "#1f2328"
MUTED = "#6e7681"
LINE = "#d0d7de"
PAPER = "#ffffff"


def carrier_colour(rank: int) -> str:
    """The colour of the `rank`-th carrier: the eight of `CARRIERS`, then their lighter shades, then again."""
    cycle, position = divmod(rank, len(CARRIERS))
    colour = CARRIERS[position]
    return colour if cycle % 2 == 0 else to_hex(0.5 + 0.5 * to_rgb(colour))


def to_rgb(colour: str) -> Float[Tensor, "3"]:
    """`#rrggbb` as three numbers in 0..1."""
    return torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def to_hex(rgb: Float[Tensor, "3"]) -> str:
    """Three numbers in 0..1 as `#rrggbb`."""
    return "#" + "".join(f"{int(value):02x}" for value in (rgb * 255).round())
