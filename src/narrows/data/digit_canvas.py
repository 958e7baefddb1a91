"""Canvases with clutter, and handwritten digits to put on them: what every set of digit scenes is drawn with."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from narrows.data.image_set import MEAN_AND_STD, ImageSet
from narrows.data.random import keys, uniforms
from narrows.errors import InvalidArgument, MissingExtra
from narrows.validation import check_positive

HELD_OUT_RULE = "every fifth handwritten digit of each class, in scikit-learn's order"

_PARAMETERS = 96
_STROKES, _BLOBS, _FRAGMENTS = 3, 2, 2


class DigitCanvas(ImageSet):
    """Base class of sets of digit scenes: the canvas, its clutter, and how a digit is put on it.

    Scene i is a pure function of (seed, split, epoch, i). Training scenes are drawn anew every epoch; held-out scenes
    never change. Held out is every fifth digit of each class, so that no handwritten digit, whole or in fragments, is
    in both splits. A subclass implements `batch`.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        digit_size: least and greatest side of a digit in pixels.
        length: scenes in an epoch; by default 6000 for training and four for each held-out digit.
        seed: of the scenes.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int,
        digit_size: tuple[float, float],
        length: int | None,
        seed: int,
    ) -> None:
        if split not in ("train", "held_out"):
            raise InvalidArgument("split", expected="'train' or 'held_out'", got=repr(split))
        if size < 16:
            raise InvalidArgument("size", expected="at least 16 pixels, so that digits can be read", got=size)
        if not 8 <= digit_size[0] <= digit_size[1] <= size:
            raise InvalidArgument("digit_size", expected=f"8 <= least <= greatest <= {size}", got=digit_size)
        self.split, self.size, self.digit_size, self.seed = split, size, digit_size, seed
        self.sources, self.labels = source_digits(split)
        self._length = (6000 if split == "train" else 4 * len(self.sources)) if length is None else length
        check_positive(length=self._length)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`scene 17`, say."""
        return f"scene {index}"

    def draw(self, indices: Sequence[int], epoch: int) -> tuple[NDArray[np.uint64], Tensor]:
        """A key for each scene, and the uniform numbers that make it: `[B]`, `[B, parameters]`."""
        training = self.split == "train"
        key = keys(self.seed, int(training), epoch if training else 0, np.asarray(indices, np.uint64))
        return key, torch.from_numpy(uniforms(key, _PARAMETERS))

    def clutter(self, random: Tensor) -> Tensor:
        """`[B, size, size]`: scenes in which everything is there but what is looked for."""
        canvas = self._background(random[:, 1:20])
        for stroke in random[:, 20:41].unflatten(1, (_STROKES, 7)).unbind(1):
            canvas = self._stroke(canvas, stroke)
        for fragment in random[:, 41:61].unflatten(1, (_FRAGMENTS, 10)).unbind(1):
            canvas = self._fragment(canvas, fragment)
        for blob in random[:, 61:69].unflatten(1, (_BLOBS, 4)).unbind(1):
            canvas = self._blob(canvas, blob)
        return canvas

    def photograph(self, canvas: Tensor, key: NDArray[np.uint64]) -> UInt8[Tensor, "B 1 size size"]:
        """The canvas with grain, in bytes."""
        grain = uniforms(keys(self.seed, 2, key), self.size**2).reshape(-1, self.size, self.size)
        canvas = canvas + (torch.from_numpy(grain) - 0.5) * 0.12
        return (canvas * 255).round().clamp(0, 255).to(torch.uint8)[:, None]

    @staticmethod
    def normalised(images: UInt8[Tensor, "B 1 size size"]) -> Float[Tensor, "B 1 size size"]:
        """Bytes as a model takes them."""
        (mean,), (std,) = MEAN_AND_STD[1]
        return (images.float() / 255 - mean) / std

    @property
    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Centres of the pixels in [0, 1]: x `[1, 1, size]` and y `[1, size, 1]`."""
        centres = (torch.arange(self.size) + 0.5) / self.size
        return centres.view(1, 1, -1), centres.view(1, -1, 1)

    def _background(self, random: Tensor) -> Tensor:
        """A level, a slope of light and a slow unevenness."""
        x, y = self._pixels
        across, down = between(random[:, 1], -0.2, 0.2), between(random[:, 2], -0.2, 0.2)
        light = between(random[:, 0], 0.15, 0.4) + across * (x - 0.5) + down * (y - 0.5)
        uneven = F.interpolate(random[:, 3:19].view(-1, 1, 4, 4), (self.size, self.size), mode="bilinear")
        return light + (uneven[:, 0] - 0.5) * 0.2

    def _stroke(self, canvas: Tensor, random: Tensor) -> Tensor:
        """A straight line of some width, lighter or darker than what is under it; three of four scenes get it."""
        x, y = self._pixels
        from_x, from_y, angle, length, width, level, there = (value.view(-1, 1, 1) for value in random.unbind(1))
        along_x, along_y = torch.cos(angle * 2 * torch.pi), torch.sin(angle * 2 * torch.pi)
        along = ((x - from_x) * along_x + (y - from_y) * along_y).clamp(min=0).minimum(0.1 + length * 0.35)
        distance = torch.hypot(x - from_x - along * along_x, y - from_y - along * along_y)
        return canvas.lerp(level * 0.7, (there < 0.75) * _edge((0.015 + width * 0.025 - distance) * 30))

    def _blob(self, canvas: Tensor, random: Tensor) -> Tensor:
        """A soft spot, bright or dark."""
        x, y = self._pixels
        at_x, at_y, radius, strength = (value.view(-1, 1, 1) for value in random.unbind(1))
        square = ((x - at_x) ** 2 + (y - at_y) ** 2) / (0.05 + radius * 0.1) ** 2
        return canvas + torch.exp(-square) * (strength - 0.5) * 0.6

    def _fragment(self, canvas: Tensor, random: Tensor) -> Tensor:
        """A piece of another digit, about a third of it, fainter than a digit."""
        source = self.sources[(random[:, 0] * len(self.sources)).long()]
        cells = torch.arange(source.shape[-1]) / source.shape[-1]
        left, top = between(random[:, 1], 0.1, 0.5), between(random[:, 2], 0.1, 0.5)
        inside = ((cells - left.squeeze(-1)).unsqueeze(1), (cells - top.squeeze(-1)).unsqueeze(2))
        for distance in inside:
            source = source * ((distance > 0) & (distance < 0.4))
        least, greatest = self.digit_size
        piece, _ = self.place(source, random[:, 3:8], (least * 0.8, greatest), margin=-0.3)
        return canvas.lerp(between(random[:, 8], 0.3, 0.6), piece * (random[:, 9] < 0.75).view(-1, 1, 1))

    def place(
        self, sources: Tensor, random: Tensor, sizes: tuple[float, float], margin: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Cover `[B, size, size]` of digits put at a random place, size, turn and slant, and their boxes in pixels.

        `margin` is how far from the border they stay, as a share of the canvas; negative lets them reach over it.
        """
        side = between(random[:, 0], *sizes) / self.size
        x, y = self._pixels
        at_x, at_y = (side / 2 + margin + value.view(-1, 1, 1) * (1 - side - 2 * margin) for value in random[:, 1:3].T)
        turn, slant = between(random[:, 3], -0.2, 0.2), between(random[:, 4], -0.15, 0.15)
        across, down = (x - at_x) / side, (y - at_y) / side
        turned_x = across * torch.cos(turn) + down * torch.sin(turn)
        turned_y = down * torch.cos(turn) - across * torch.sin(turn)
        # Sources are 10 cells wide, 8 of digit and a cell of nothing on either side.
        grid = torch.stack((turned_x + slant * turned_y, turned_y), -1) * (2 * 8 / 10)
        cover = F.grid_sample(sources[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]
        corners = torch.cat((at_x - side / 2, at_y - side / 2, at_x + side / 2, at_y + side / 2), 1)
        return _edge((cover - 0.4) * 3), corners[..., 0] * self.size


def between(uniform: Tensor, least: float, greatest: float) -> Tensor:
    """`[B]` in [0, 1) to `[B, 1, 1]` in [least, greatest)."""
    return (least + uniform * (greatest - least)).view(-1, 1, 1)


def _edge(distance: Tensor) -> Tensor:
    """0 well outside, 1 well inside, smooth between -0.5 and 0.5."""
    inside = (distance + 0.5).clamp(0, 1)
    return inside * inside * (3 - 2 * inside)


@cache
def source_digits(split: str) -> tuple[Float[Tensor, "digits 40 40"], Int[Tensor, "digits"]]:
    """The handwritten digits of a split, enlarged smoothly from 8x8 (with a border of one cell), and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="train", purpose="make digit scenes") from error
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()  # pyright: ignore[reportAttributeAccessIssue]
    small = torch.from_numpy(bunch.images).float() / 16  # pyright: ignore[reportAttributeAccessIssue]
    rank = torch.stack([labels == digit for digit in range(10)]).cumsum(1)[labels, torch.arange(len(labels))]
    chosen = (rank % 5 == 0) == (split == "held_out")
    bordered = F.pad(small[chosen][:, None], (1, 1, 1, 1))
    large = F.interpolate(bordered, (40, 40), mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)
    return large.contiguous(), labels[chosen]
