"""Scenes with several handwritten digits, every pixel labelled: for segmentation and for detection."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from narrows.data.digit_canvas import HELD_OUT_RULE, DigitCanvas, between
from narrows.data.image_set import IGNORED, ImageData
from narrows.data.random import keys, uniforms
from narrows.errors import InvalidArgument

CLASSES = ("background", *"0123456789")
SIZE = 64

_PLACES = 8
_PER_DIGIT = 5 + 2 * _PLACES


class SegmentedScenes(NamedTuple):
    """Rendered scenes, the class of every pixel, and the class and box of every digit.

    Args:
        images: `[B, 1, size, size]`.
        classes: `[B, size, size]`, 0 on the background and d + 1 on the digit d.
        labels: `[B, K]`, d + 1 for the digit d; -100 in scenes with fewer than K digits.
        boxes: `[B, K, 4]`, left, top, right and bottom of the digits' squares in pixels; 0 where there is none.
    """

    images: UInt8[Tensor, "B 1 size size"]
    classes: Int[Tensor, "B size size"]
    labels: Int[Tensor, "B K"]
    boxes: Float[Tensor, "B K 4"]


class SegmentedDigits(DigitCanvas):
    """Several handwritten digits (scikit-learn's 8x8 ones) on a canvas with clutter; label = the class of each pixel.

    Canvas, clutter and splits are those of `DigitScenes`, and strokes, blobs and fragments of digits are background.
    Digits keep apart where they can: each takes that of eight random places which covers least of those before it, and
    lies on top of them.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        digit_size: least and greatest side of a digit in pixels; by default 5 and 7 sixteenths of `size`.
        digits: least and greatest number of digits in a scene.
        length: scenes in an epoch; by default 6000 for training and four for each held-out digit.
        seed: of the scenes.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = SIZE,
        digit_size: tuple[float, float] | None = None,
        digits: tuple[int, int] = (1, 3),
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            split, size=size, digit_size=digit_size or (size * 5 / 16, size * 7 / 16), length=length, seed=seed
        )
        if not 0 <= digits[0] <= digits[1] or digits[1] < 1:
            raise InvalidArgument("digits", expected="0 <= least <= greatest, and one at least", got=digits)
        self.digits = digits

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Float[Tensor, "B 1 H W"], Int[Tensor, "B H W"]]:
        """Normalised images and the class of each pixel."""
        scenes = self.render(indices, epoch)
        return self.normalised(scenes.images), scenes.classes

    def render(self, indices: Sequence[int], epoch: int = 0) -> SegmentedScenes:
        """These scenes as `SegmentedScenes`, with the digits one by one."""
        key, random = self.draw(indices, epoch)
        least, most = self.digits
        ours = torch.from_numpy(uniforms(keys(self.seed, 3, key), 1 + most * _PER_DIGIT))
        count = least + (ours[:, 0] * (most - least + 1)).long()
        canvas = self.clutter(random)
        classes = torch.zeros(canvas.shape, dtype=torch.long)
        labels, boxes = torch.full((len(canvas), most), IGNORED), torch.zeros(len(canvas), most, 4)
        for digit, parameters in enumerate(ours[:, 1:].unflatten(1, (most, _PER_DIGIT)).unbind(1)):
            there = (digit < count).view(-1, 1, 1)
            chosen = (parameters[:, 0] * len(self.sources)).long()
            placed = self._apart(parameters[:, 1:], boxes[:, :digit])
            cover, box = self.place(self.sources[chosen], placed, self.digit_size)
            canvas = canvas.lerp(between(random[:, 74], 0.75, 1.0), cover * there)
            classes = torch.where(there & (cover > 0.5), self.labels[chosen].view(-1, 1, 1) + 1, classes)
            labels[:, digit] = torch.where(digit < count, self.labels[chosen] + 1, IGNORED)
            boxes[:, digit] = box * there[..., 0]
        return SegmentedScenes(self.photograph(canvas, key), classes, labels, boxes)

    def _apart(self, random: Float[Tensor, "B parameters"], boxes: Float[Tensor, "B K 4"]) -> Float[Tensor, "B 5"]:
        """Size, place, turn and slant for `place`, the place being the one of several that covers least of `boxes`."""
        size_turn_slant, places = random[:, :3], random[:, 3 : 3 + 2 * _PLACES].unflatten(1, (_PLACES, 1, 2))
        side = between(size_turn_slant[:, 0], *self.digit_size).unsqueeze(1)
        corner = places * (self.size - side)
        low, high = boxes[:, None, :, :2], boxes[:, None, :, 2:]
        covered = ((corner + side).minimum(high) - corner.maximum(low)).clamp(min=0).prod(-1).sum(-1)
        place = places[torch.arange(len(places)), covered.argmin(1), 0]
        return torch.cat((size_turn_slant[:, :1], place, size_turn_slant[:, 1:]), 1)


def load_segmented(data: str = "digits", *, image_size: int | None = None, seed: int = 0) -> ImageData:
    """Images whose pixels are labelled, to train a segmenter on and to judge it by.

    Args:
        data: "digits", scenes with several handwritten digits, no download.
        image_size: side of the square images; by default 64.
        seed: of the training scenes. Held-out scenes do not depend on it.

    Raises:
        InvalidArgument: other data than digits, or `image_size` is too small.
    """
    if data != "digits":
        raise InvalidArgument(
            "data",
            expected="'digits', the only images here that come with the class of every pixel",
            got=repr(data),
            hint="Give Lightning's Trainer a data loader of (images, classes) for others.",
        )
    size = SIZE if image_size is None else image_size
    held_out = SegmentedDigits("held_out", size=size)
    return ImageData(
        name="digits",
        train=SegmentedDigits("train", size=size, seed=seed),
        held_out=held_out,
        test=held_out,
        classes=CLASSES,
        image_size=size,
        channels=1,
        held_out_rule=HELD_OUT_RULE,
    )
