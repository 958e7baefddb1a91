"""What training asks of images: `ImageSet`, and the two of them that make an `ImageData`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from narrows.data.positions import Position

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
