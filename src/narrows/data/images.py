"""What training asks of images: `ImageSet`, and the two of them that make an `ImageData`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from narrows.data.positions import Position
from narrows.errors import InvalidArgument

IGNORED = -100
"""The label of an image that counts in no loss and no metric."""

MEAN_AND_STD = {1: ((0.35,), (0.24,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""By channels: of digit scenes, and of ImageNet as everywhere. Pixels in [0, 1] are normalised with them."""


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
        """What to call this image in a table."""
        raise NotImplementedError

    def __getitem__(self, index: int | Position) -> tuple[Tensor, Tensor]:
        position = index if isinstance(index, Position) else Position(range(len(self))[index])
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def __getitems__(self, positions: Sequence[Position]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: `DataLoader` calls this where it is there."""
        positions = [p if isinstance(p, Position) else Position(p) for p in positions]
        images, labels = self.batch([p.index for p in positions], positions[0].epoch)
        fills = torch.tensor([not position.counts for position in positions])
        return images, labels.masked_fill(fills.view(-1, *(1 for _ in labels.shape[1:])), IGNORED)


@dataclass(frozen=True)
class ImageData:
    """Images to train on and images to judge by.

    Args:
        name: "digits", or the folder.
        train: what is trained on.
        held_out: what is validated on; shares no image with `train`.
        test: what is tested on: `held_out` again, unless the folder has both a `val` and a `test`.
        classes: names of the classes; labels count in this order.
        image_size: side of the square images.
        channels: channels of the images.
        held_out_rule: in words, which images are held out.
        skipped: images that cannot be read and are left out.
    """

    name: str
    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    image_size: int
    channels: int
    held_out_rule: str
    skipped: tuple[Path, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


def picture(images: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
    """Normalised images as pictures in [0, 1]."""
    mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in MEAN_AND_STD[images.shape[-3]])
    return (images * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class Augmentation:
    """Random crops and mirror images, and what else is asked for; the same random numbers give the same image.

    Args:
        least_area: least share of the image's area that a crop keeps.
        operations: how many operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719) change a crop; 0 for none.
        magnitude: of these operations, 0 to 30.
        erasing: how likely a rectangle of the crop becomes noise (Zhong et al. 2017, arXiv 1708.04896).
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

    def of_pictures(self, image_size: int) -> list[nn.Module]:
        """What comes first: a picture to a square picture."""
        from torchvision.transforms import v2

        modules: list[nn.Module] = [
            v2.RandomResizedCrop(image_size, scale=(self.least_area, 1.0)),
            v2.RandomHorizontalFlip(),
        ]
        if self.operations:
            grey = [round(255 * mean) for mean in MEAN_AND_STD[3][0]]
            modules.append(v2.RandAugment(self.operations, self.magnitude, fill=grey))
        return modules

    def of_numbers(self) -> list[nn.Module]:
        """What comes last: a normalised image to another."""
        from torchvision.transforms import v2

        return [v2.RandomErasing(self.erasing, value="random")] if self.erasing else []  # pyright: ignore


class RememberedImages(ImageSet):
    """The batches of another set, drawn or read when first asked for and handed out again from then on.

    Args:
        images: the other set.
        capacity: bytes of images that are remembered; batches beyond are drawn every time.
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
        """Normalised images and labels, as of the other set."""
        which = epoch, tuple(indices)
        batch = self._batches.get(which)
        if batch is None:
            batch = self.images.batch(indices, epoch)
            if batch[0].nbytes <= self.capacity:
                self.capacity -= batch[0].nbytes
                self._batches[which] = batch
        return batch
