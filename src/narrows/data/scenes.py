"""Digit scenes: handwritten digits on cluttered canvases, drawn without a download, labelled by image or by pixel."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from narrows.data.images import IGNORED, MEAN_AND_STD, ImageData, ImageSet
from narrows.data.positions import keys, uniforms
from narrows.errors import InvalidArgument, MissingExtra
from narrows.validation import check_positive

HELD_OUT_RULE = "every fifth handwritten digit of each class, in scikit-learn's order"

_PARAMETERS = 96
_STROKES, _BLOBS, _FRAGMENTS = 3, 2, 2


class DigitCanvas(ImageSet):
    """Base class of data sets of digit scenes: canvas, clutter, and the drawing of digits.

    Scene i is a pure function of (seed, split, epoch, i). Training scenes are drawn anew every epoch; held-out scenes
    never change. Every fifth handwritten digit of each class is held out, so that none, whole or in fragments, is in
    both splits. A subclass implements `batch`.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        digit_size: smallest and greatest side of a digit in pixels.
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
        """`scene 17`, for instance."""
        return f"scene {index}"

    def draw(self, indices: Sequence[int], epoch: int) -> tuple[NDArray[np.uint64], Tensor]:
        """A key for each scene, and uniform random numbers for its parameters: `[B]`, `[B, parameters]`."""
        training = self.split == "train"
        key = keys(self.seed, int(training), epoch if training else 0, np.asarray(indices, np.uint64))
        return key, torch.from_numpy(uniforms(key, _PARAMETERS))

    def clutter(self, random: Tensor) -> Tensor:
        """`[B, size, size]`: background, strokes, fragments of digits and blobs."""
        canvas = self._background(random[:, 1:20])
        for stroke in random[:, 20:41].unflatten(1, (_STROKES, 7)).unbind(1):
            canvas = self._stroke(canvas, stroke)
        for fragment in random[:, 41:61].unflatten(1, (_FRAGMENTS, 10)).unbind(1):
            canvas = self._fragment(canvas, fragment)
        for blob in random[:, 61:69].unflatten(1, (_BLOBS, 4)).unbind(1):
            canvas = self._blob(canvas, blob)
        return canvas

    def to_bytes(self, canvas: Tensor, key: NDArray[np.uint64]) -> UInt8[Tensor, "B 1 size size"]:
        """The canvas with grain, as 8-bit images."""
        grain = uniforms(keys(self.seed, 2, key), self.size**2).reshape(-1, self.size, self.size)
        canvas = canvas + (torch.from_numpy(grain) - 0.5) * 0.12
        return (canvas * 255).round().clamp(0, 255).to(torch.uint8)[:, None]

    @staticmethod
    def normalised(images: UInt8[Tensor, "B 1 size size"]) -> Float[Tensor, "B 1 size size"]:
        """8-bit images normalised for a model."""
        (mean,), (std,) = MEAN_AND_STD[1]
        return (images.float() / 255 - mean) / std

    @property
    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Centres of the pixels in [0, 1]: x `[1, 1, size]` and y `[1, size, 1]`."""
        centres = (torch.arange(self.size) + 0.5) / self.size
        return centres.view(1, 1, -1), centres.view(1, -1, 1)

    def _background(self, random: Tensor) -> Tensor:
        """A grey level with a gradient of light and low-frequency noise."""
        x, y = self._pixels
        across, down = between(random[:, 1], -0.2, 0.2), between(random[:, 2], -0.2, 0.2)
        light = between(random[:, 0], 0.15, 0.4) + across * (x - 0.5) + down * (y - 0.5)
        uneven = F.interpolate(random[:, 3:19].view(-1, 1, 4, 4), (self.size, self.size), mode="bilinear")
        return light + (uneven[:, 0] - 0.5) * 0.2

    def _stroke(self, canvas: Tensor, random: Tensor) -> Tensor:
        """Draw a straight stroke of random width and grey level, in three of four scenes."""
        x, y = self._pixels
        from_x, from_y, angle, length, width, level, there = (value.view(-1, 1, 1) for value in random.unbind(1))
        along_x, along_y = torch.cos(angle * 2 * torch.pi), torch.sin(angle * 2 * torch.pi)
        along = ((x - from_x) * along_x + (y - from_y) * along_y).clamp(min=0).minimum(0.1 + length * 0.35)
        distance = torch.hypot(x - from_x - along * along_x, y - from_y - along * along_y)
        return canvas.lerp(level * 0.7, (there < 0.75) * _edge((0.015 + width * 0.025 - distance) * 30))

    def _blob(self, canvas: Tensor, random: Tensor) -> Tensor:
        """Draw a soft bright or dark spot."""
        x, y = self._pixels
        at_x, at_y, radius, strength = (value.view(-1, 1, 1) for value in random.unbind(1))
        square = ((x - at_x) ** 2 + (y - at_y) ** 2) / (0.05 + radius * 0.1) ** 2
        return canvas + torch.exp(-square) * (strength - 0.5) * 0.6

    def _fragment(self, canvas: Tensor, random: Tensor) -> Tensor:
        """Draw a third of another digit, fainter than digits, in three of four scenes."""
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
        """Coverage `[B, size, size]` of digits at random position, size, rotation and slant, and their boxes in pixels.

        `margin` is their distance from the border, as a share of the canvas; negative lets them reach over it.
        """
        side = between(random[:, 0], *sizes) / self.size
        x, y = self._pixels
        at_x, at_y = (side / 2 + margin + value.view(-1, 1, 1) * (1 - side - 2 * margin) for value in random[:, 1:3].T)
        rotation, slant = between(random[:, 3], -0.2, 0.2), between(random[:, 4], -0.15, 0.15)
        across, down = (x - at_x) / side, (y - at_y) / side
        rotated_x = across * torch.cos(rotation) + down * torch.sin(rotation)
        rotated_y = down * torch.cos(rotation) - across * torch.sin(rotation)
        # Sources are 10 cells wide: 8 of the digit and an empty cell on either side.
        grid = torch.stack((rotated_x + slant * rotated_y, rotated_y), -1) * (2 * 8 / 10)
        cover = F.grid_sample(sources[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]
        corners = torch.cat((at_x - side / 2, at_y - side / 2, at_x + side / 2, at_y + side / 2), 1)
        return _edge((cover - 0.4) * 3), corners[..., 0] * self.size


def between(uniform: Tensor, least: float, greatest: float) -> Tensor:
    """`[B]` in [0, 1) to `[B, 1, 1]` in [least, greatest)."""
    return (least + uniform * (greatest - least)).view(-1, 1, 1)


def _edge(distance: Tensor) -> Tensor:
    """A smooth step from 0 at -0.5 to 1 at 0.5."""
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


class Scenes(NamedTuple):
    """Rendered scenes with masks and boxes of their digits.

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
    """One of scikit-learn's 1797 handwritten digits (8x8) on a larger canvas with clutter; the label is the digit.

    The digit is enlarged smoothly, rotated a little and put anywhere; around it are strokes, blobs and fragments of
    other digits on a background of uneven light. See `DigitCanvas` for splits and randomness.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        digit_size: smallest and greatest side of a digit in pixels; by default half and five eighths of `size`.
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
        return Scenes(self.to_bytes(canvas, key), self.labels[chosen], digit > 0.5, boxes)


CLASSES = ("background", *"0123456789")
SIZE = 64

_PLACES = 8
_PER_DIGIT = 5 + 2 * _PLACES


class SegmentedScenes(NamedTuple):
    """Rendered scenes with the class of every pixel, and the class and box of every digit.

    Args:
        images: `[B, 1, size, size]`.
        classes: `[B, size, size]`, 0 on the background and d + 1 on the digit d.
        objects: `[B, size, size]`, 0 on the background and k on the k-th digit of the scene.
        labels: `[B, K]`, d + 1 for the digit d; -100 in scenes with fewer than K digits.
        boxes: `[B, K, 4]`, left, top, right and bottom of the digits' squares in pixels; 0 where there is none.
    """

    images: UInt8[Tensor, "B 1 size size"]
    classes: Int[Tensor, "B size size"]
    objects: Int[Tensor, "B size size"]
    labels: Int[Tensor, "B K"]
    boxes: Float[Tensor, "B K 4"]


class SegmentedDigits(DigitCanvas):
    """Several handwritten digits on a canvas with clutter; the label is the class of each pixel.

    Canvas, clutter and splits are those of `DigitScenes`; strokes, blobs and fragments of digits are background. Each
    digit takes the one of eight random positions that overlaps least with the digits before it, and is drawn over them.

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
        classes, objects = (torch.zeros(canvas.shape, dtype=torch.long) for _ in range(2))
        labels, boxes = torch.full((len(canvas), most), IGNORED), torch.zeros(len(canvas), most, 4)
        for digit, parameters in enumerate(ours[:, 1:].unflatten(1, (most, _PER_DIGIT)).unbind(1)):
            there = (digit < count).view(-1, 1, 1)
            chosen = (parameters[:, 0] * len(self.sources)).long()
            placed = self._apart(parameters[:, 1:], boxes[:, :digit])
            cover, box = self.place(self.sources[chosen], placed, self.digit_size)
            canvas = canvas.lerp(between(random[:, 74], 0.75, 1.0), cover * there)
            classes = torch.where(there & (cover > 0.5), self.labels[chosen].view(-1, 1, 1) + 1, classes)
            objects = torch.where(there & (cover > 0.5), digit + 1, objects)
            labels[:, digit] = torch.where(digit < count, self.labels[chosen] + 1, IGNORED)
            boxes[:, digit] = box * there[..., 0]
        return SegmentedScenes(self.to_bytes(canvas, key), classes, objects, labels, boxes)

    def _apart(self, random: Float[Tensor, "B parameters"], boxes: Float[Tensor, "B K 4"]) -> Float[Tensor, "B 5"]:
        """Parameters of `place`, with the one of several random positions that overlaps `boxes` least."""
        others, places = random[:, :3], random[:, 3 : 3 + 2 * _PLACES].unflatten(1, (_PLACES, 1, 2))
        side = between(others[:, 0], *self.digit_size).unsqueeze(1)
        corner = places * (self.size - side)
        low, high = boxes[:, None, :, :2], boxes[:, None, :, 2:]
        covered = ((corner + side).minimum(high) - corner.maximum(low)).clamp(min=0).prod(-1).sum(-1)
        place = places[torch.arange(len(places)), covered.argmin(1), 0]
        return torch.cat((others[:, :1], place, others[:, 1:]), 1)


def load_segmented(data: str = "digits", *, image_size: int | None = None, seed: int = 0) -> ImageData:
    """Images with pixel labels, to train and evaluate a segmenter.

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


class SceneKind(NamedTuple):
    """Default sizes of a kind of digit scenes.

    Args:
        image_size: side of the square images.
        digit_size: smallest and greatest side of a digit, as shares of `image_size`.
    """

    image_size: int
    digit_size: tuple[float, float]


SCENES = {"digits": SceneKind(32, (1 / 2, 5 / 8)), "small_digits": SceneKind(64, (5 / 28, 2 / 7))}


def load_scenes(name: str, split: str, *, image_size: int | None = None, seed: int = 0) -> DigitScenes:
    """One split of the kind of scenes called `name` in `SCENES`."""
    kind = SCENES[name]
    size = kind.image_size if image_size is None else image_size
    least, greatest = kind.digit_size
    return DigitScenes(split, size=size, digit_size=(size * least, size * greatest), seed=seed)


def load_digits(name: str, *, image_size: int | None, seed: int) -> ImageData:
    """Both splits of these scenes as `ImageData`; see `narrows.data.load`."""
    train = load_scenes(name, "train", image_size=image_size, seed=seed)
    held_out = load_scenes(name, "held_out", image_size=image_size)
    return ImageData(
        name=name,
        train=train,
        held_out=held_out,
        test=held_out,
        classes=tuple("0123456789"),
        image_size=train.size,
        channels=1,
        held_out_rule=HELD_OUT_RULE,
    )
