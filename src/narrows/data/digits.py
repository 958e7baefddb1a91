"""Scenes with a handwritten digit somewhere in them: images that need no download and show where tokens go."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from narrows.data.digit_canvas import DigitCanvas, between


class Scenes(NamedTuple):
    """Rendered scenes and where their digits are.

    Args:
        images: `[B, 1, size, size]`.
        labels: `[B]`, the digit.
        masks: `[B, size, size]`, True on the digit.
        boxes: `[B, 4]`, left, top, right and bottom of the digit's square in pixels.
    """

    images: UInt8[Tensor, "B 1 size size"]
    labels: Int[Tensor, "B"]
    masks: Bool[Tensor, "B size size"]
    boxes: Float[Tensor, "B 4"]


class DigitScenes(DigitCanvas):
    """One handwritten digit (scikit-learn's 8x8 ones, 1797 of them) on a larger canvas with clutter; label = the digit.

    The digit is enlarged smoothly, turned a little and put anywhere; around it are strokes, blobs and fragments of
    other digits on a background of uneven light. Scene i is a pure function of (seed, split, epoch, i). Training
    scenes are drawn anew every epoch; held-out scenes never change. Held out is every fifth digit of each class, so
    that no handwritten digit, whole or in fragments, is in both splits.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        digit_size: least and greatest side of a digit in pixels; by default half and five eighths of `size`.
        length: scenes in an epoch; by default 6000 for training and four for each held-out digit.
        seed: of the scenes.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 32,
        digit_size: tuple[float, float] | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(split, size=size, digit_size=digit_size or (size / 2, size * 5 / 8), length=length, seed=seed)

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Float[Tensor, "B 1 H W"], Int[Tensor, "B"]]:
        """Normalised images and labels."""
        scenes = self.render(indices, epoch)
        return self.normalised(scenes.images), scenes.labels

    def render(self, indices: Sequence[int], epoch: int = 0) -> Scenes:
        """These scenes as `Scenes`, with masks and boxes of the digits."""
        key, random = self.draw(indices, epoch)
        chosen = (random[:, 0] * len(self.sources)).long()
        if self.split != "train":  # every held-out digit equally often
            chosen = torch.tensor(indices) % len(self.sources)
        canvas = self.clutter(random)
        digit, boxes = self.place(self.sources[chosen], random[:, 69:74], self.digit_size)
        canvas = canvas.lerp(between(random[:, 74], 0.75, 1.0), digit)
        return Scenes(self.photograph(canvas, key), self.labels[chosen], digit > 0.5, boxes)
