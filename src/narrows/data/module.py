"""Images for Lightning's trainer."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from narrows.data.augmentation import Augmentation
from narrows.data.folder import load_unlabelled
from narrows.data.image_set import ImageData, ImageSet
from narrows.data.load import load
from narrows.data.positioned import PositionedDataModule
from narrows.data.segmented import load_segmented


class ImageDataModule(PositionedDataModule):
    """Digit scenes or a folder of images, in an order that is a pure function of (seed, epoch, position).

    A checkpoint taken in the middle of an epoch goes on with the very next image.

    Args:
        data: "digits", "small_digits", or a folder with one folder of images for each class.
        image_size: side of the square images; by default 32 for digits, 64 for small digits and folders.
        batch_size: images in a batch of one process.
        num_workers: processes that prepare images; 0 prepares them in the training process.
        seed: of scenes, augmentation and order.
        images: what `predict` looks at: image files, or folders of them; by default the held-out images.
        augmentation: how a folder's training images are varied, by default cropped and mirrored.
    """

    def __init__(
        self,
        data: str = "digits",
        *,
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        images: Sequence[str] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.data, self.image_size, self.images, self.augmentation = data, image_size, images, augmentation

    @cached_property
    def loaded(self) -> ImageData:
        """The images; read, and checked for images that cannot be read, when first asked for."""
        return load(self.data, image_size=self.image_size, seed=self.seed, augmentation=self.augmentation)

    @cached_property
    def to_predict(self) -> ImageSet:
        """The images that `predict` looks at."""
        loaded = self.loaded
        if self.images is None:
            return loaded.held_out
        return load_unlabelled(self.images, image_size=loaded.image_size, channels=loaded.channels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches of an epoch's images in an order of their own."""
        return self.in_new_order(self.loaded.train, self.loaded.name)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out images."""
        return self.in_order(self.loaded.held_out)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images: the held-out ones, unless the folder has both `val` and `test`."""
        return self.in_order(self.loaded.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to predict."""
        return self.in_order(self.to_predict)


class SegmentationDataModule(ImageDataModule):
    """The same with the class of every pixel as labels: digit scenes with several digits.

    Args:
        data: "digits".
        image_size: side of the square images; by default 64.
        batch_size, num_workers, seed, images: as of `ImageDataModule`.
    """

    def __init__(
        self,
        data: str = "digits",
        *,
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        images: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            data, image_size=image_size, batch_size=batch_size, num_workers=num_workers, seed=seed, images=images
        )

    @cached_property
    def loaded(self) -> ImageData:
        """The images, drawn when asked for."""
        return load_segmented(self.data, image_size=self.image_size, seed=self.seed)
