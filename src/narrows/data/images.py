"""Labelled images for training and evaluation: `ImageSet`, `ImageData` and augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

from narrows.data.positions import Position
from narrows.data.tables import Row
from narrows.errors import InvalidArgument

IGNORED = -100
"""The label of images and pixels that are left out of losses and metrics."""

MEAN_AND_STD = {1: ((0.35,), (0.24,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""Mean and spread that normalise pixels in [0, 1], by channels: of digit scenes (1) and of ImageNet (3)."""


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images that can be fetched a batch at a time; a label for each image, or for each of its pixels.

    A subclass implements `__len__`, `batch` and `name`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B *pixels"]]:
        """Normalised images and labels, a pure function of the arguments."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of an image in tables."""
        raise NotImplementedError

    def __getitem__(self, index: int | Position) -> tuple[Tensor, Tensor]:
        position = index if isinstance(index, Position) else Position(range(len(self))[index])
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def __getitems__(self, positions: Sequence[Position]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: `DataLoader` calls this where it exists."""
        positions = [p if isinstance(p, Position) else Position(p) for p in positions]
        images, labels = self.batch([p.index for p in positions], positions[0].epoch)
        padding = torch.tensor([not position.counts for position in positions])
        return images, labels.masked_fill(padding.view(-1, *(1 for _ in labels.shape[1:])), IGNORED)


@dataclass(frozen=True)
class ImageData:
    """Images to train on and images to evaluate on.

    Args:
        name: "digits", or the folder or table.
        train: for training.
        held_out: for validation; shares no image with `train`.
        test: for testing: `held_out` again, unless the folder has both a `val` and a `test`.
        classes: names of the classes; labels count in this order.
        image_size: side of the square images.
        channels: channels of the images.
        held_out_rule: which images are held out, in words.
        skipped: unreadable images, which are left out.
        left_out: what else in the folder was left out, in words.
    """

    name: str
    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    image_size: int
    channels: int
    held_out_rule: str
    skipped: tuple[Path | Row, ...] = ()
    left_out: str = ""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


def normalised(images: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """8-bit colour images normalised for a model."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in MEAN_AND_STD[3])
    return (images.float() / 255 - mean) / std


def picture(images: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
    """Normalised images back in [0, 1], to be looked at."""
    mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in MEAN_AND_STD[images.shape[-3]])
    return (images * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images: random crops and flips, optionally RandAugment and random erasing.

    Args:
        least_area: the smallest share of the image's area that a crop keeps.
        operations: number of RandAugment operations for each crop (Cubuk et al. 2019, arXiv 1909.13719).
        magnitude: of these operations, 0 to 30.
        erasing: probability of random erasing (Zhong et al. 2017, arXiv 1708.04896).
    """

    least_area: float = 0.4
    operations: int = 0
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.least_area <= 1:
            raise InvalidArgument("least_area", expected="a share in (0, 1]", got=self.least_area)
        if not 0 <= self.erasing <= 1:
            raise InvalidArgument("erasing", expected="a share in [0, 1]", got=self.erasing)
        if self.operations < 0:
            raise InvalidArgument("operations", expected="0 or more", got=self.operations)
        if not 0 <= self.magnitude <= 30:
            raise InvalidArgument("magnitude", expected="0 to 30", got=self.magnitude)

    def before_normalisation(self, image_size: int) -> list[nn.Module]:
        """Transforms of a picture to a square picture."""
        from torchvision.transforms import v2

        modules: list[nn.Module] = [
            v2.RandomResizedCrop(image_size, scale=(self.least_area, 1.0)),
            v2.RandomHorizontalFlip(),
        ]
        if self.operations:
            grey = [round(255 * mean) for mean in MEAN_AND_STD[3][0]]
            modules.append(v2.RandAugment(self.operations, self.magnitude, fill=grey))
        return modules

    def after_normalisation(self) -> list[nn.Module]:
        """Transforms of a normalised tensor."""
        from torchvision.transforms import v2

        return [v2.RandomErasing(self.erasing, value="random")] if self.erasing else []  # pyright: ignore


class RememberedImages(ImageSet):
    """Cached batches of another set: drawn or read on first access only.

    Args:
        images: the other set.
        capacity: bytes of images to cache; batches beyond are drawn every time.
    """

    def __init__(self, images: ImageSet, *, capacity: int = 2**29) -> None:
        self.images, self.capacity = images, capacity
        self._batches: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """As in the other set."""
        return self.images.name(index)

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B *pixels"]]:
        """Normalised images and labels of the other set."""
        key = epoch, tuple(indices)
        batch = self._batches.get(key)
        if batch is None:
            batch = self.images.batch(indices, epoch)
            if batch[0].nbytes <= self.capacity:
                self.capacity -= batch[0].nbytes
                self._batches[key] = batch
        return batch
