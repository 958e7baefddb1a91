"""Lightning data modules of images, and the base class of all: an order by (seed, epoch, position), exact resume."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from narrows.data.folder import load_unlabelled
from narrows.data.images import Augmentation, ImageData, ImageSet
from narrows.data.load import load
from narrows.data.object_folder import load_object_folder
from narrows.data.object_scenes import OBJECT_SCENES, load_object_scenes
from narrows.data.positions import PositionSampler
from narrows.data.scenes import load_segmented
from narrows.data.tables import Data, is_table, open_table
from narrows.errors import DataError, InvalidArgument
from narrows.validation import check_not_negative, check_positive


class ImagesOf(NamedTuple):
    """What a model has to fit of the images it is trained on.

    Args:
        num_classes: how many classes there are.
        image_size: side of the square images.
        channels: channels of the images.
    """

    num_classes: int
    image_size: int
    channels: int


class PositionedDataModule(LightningDataModule):
    """Base class of data modules in which sample and order are pure functions of (seed, epoch, position).

    A checkpoint taken in the middle of an epoch resumes with the next sample. A subclass has `loaded`: what it trains
    on (`train`), validates on (`held_out`) and, where that is another set, tests on (`test`).

    Args:
        batch_size: samples in a batch of one process.
        num_workers: worker processes that prepare samples; 0 prepares them in the training process.
        seed: of the order.
        collate: makes a batch of what a data set returns for a list of positions.
        kind: what errors call the samples.
    """

    loaded: Any

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        collate: Callable[[Any], Any] | None = None,
        kind: str = "images",
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        check_not_negative(num_workers=num_workers)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.collate, self.kind = collate or _unchanged, kind
        self._resumed: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its samples are done."""
        if self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        finished = done >= self.trainer.num_training_batches
        return {
            "epoch": self.trainer.current_epoch + int(finished),
            "images": 0 if finished else done * self.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from there."""
        self._resumed = state_dict

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches of the training samples, shuffled anew every epoch.

        Raises:
            DataError: fewer samples than a batch.
        """
        samples = self.loaded.train
        sampler = PositionSampler(samples, seed=self.seed, shuffle=True, fill=False, **self._processes)
        if len(sampler) < self.batch_size:
            raise DataError(
                f"{self.loaded.name} has {len(samples)} training {self.kind}, {len(sampler)} for each process: fewer "
                f"than batch_size = {self.batch_size}. Lower batch_size or add {self.kind}."
            )
        if self._resumed:
            sampler.begin_at(self._resumed["epoch"], self._resumed["images"])
            self._resumed = {}
        return self._loader(samples, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out samples."""
        return self._in_order(self.loaded.held_out)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test samples: the held-out ones, unless there are others."""
        return self._in_order(getattr(self.loaded, "test", self.loaded.held_out))

    def _in_order(self, samples: Any) -> DataLoader[Any]:
        return self._loader(samples, PositionSampler(samples, shuffle=False, fill=True, **self._processes))

    @property
    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            return {}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def _loader(self, samples: Dataset[Any], sampler: PositionSampler, *, drop_last: bool = False) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


def _unchanged(batch: Any) -> Any:
    """`ImageSet` returns whole batches; a function of the module, so that workers can unpickle it."""
    return batch


class ImageDataModule(PositionedDataModule):
    """Digit scenes, a folder or a table of images, in an order that is a pure function of (seed, epoch, position).

    Args:
        data: "digits", "small_digits", a folder with one folder of images for each class, or a table of the `datasets`
            library: "hf:<name>", a folder that `save_to_disk` wrote, a `Dataset` or a `DatasetDict`.
        image_size: side of the square images; by default 32 for digits, 64 for all else.
        batch_size: images in a batch of one process.
        num_workers: worker processes that prepare images; 0 prepares them in the training process.
        seed: of scenes, augmentation and order.
        images: what `predict` looks at: image files, folders of them, "hf:<name>"; by default the held-out images.
        augmentation: of training images that are no scenes; by default random crops and flips.
    """

    def __init__(
        self,
        data: Data = "digits",
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
        self.trained_on: ImagesOf | None = None
        """The images that the model was trained on, where a checkpoint says it: `predict` then opens none of them."""

    @cached_property
    def loaded(self) -> ImageData:
        """The images, listed and checked on first access."""
        return load(self.data, image_size=self.image_size, seed=self.seed, augmentation=self.augmentation)

    @cached_property
    def to_predict(self) -> ImageSet:
        """The images that `predict` looks at."""
        if self.images is None:
            return self.loaded.held_out
        known = self.trained_on or self.loaded
        return load_unlabelled(self.images, image_size=self.image_size or known.image_size, channels=known.channels)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to predict."""
        return self._in_order(self.to_predict)


class SegmentationDataModule(ImageDataModule):
    """Digit scenes with several digits and a class label for every pixel.

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
        """The scenes."""
        return load_segmented(str(self.data), image_size=self.image_size, seed=self.seed)


class ObjectDataModule(ImageDataModule):
    """Scenes or a folder of images or clips, with the number of the object in each pixel where it is known.

    Args:
        data: one of `narrows.data.object_scenes.OBJECT_SCENES`, a folder or a table as `load_object_folder` takes
            it: "hf:<name>", a folder that `save_to_disk` wrote, an object of `datasets`.
        image_size: side of the square images; by default that of the scenes, 128 for a folder.
        frames: T, of clips; None for images, and for the 8 frames of "moving_sprites".
        length: scenes in an epoch.
        batch_size, num_workers, seed, images: as of `ImageDataModule`.
    """

    def __init__(
        self,
        data: Data = "sprites",
        *,
        image_size: int | None = None,
        frames: int | None = None,
        length: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        images: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            data, image_size=image_size, batch_size=batch_size, num_workers=num_workers, seed=seed, images=images
        )
        self.frames, self.length = frames, length

    @cached_property
    def loaded(self) -> ImageData:
        """The images or clips."""
        if self.data in OBJECT_SCENES:
            return load_object_scenes(
                str(self.data), image_size=self.image_size, frames=self.frames, length=self.length, seed=self.seed
            )
        source = open_table(self.data) if is_table(self.data) else Path(self.data)
        if isinstance(source, Path) and not source.exists():
            expected = f"one of {', '.join(OBJECT_SCENES)}, a folder, or hf:<name>"
            raise InvalidArgument("data", expected=expected, got=repr(self.data))
        size = 128 if self.image_size is None else self.image_size
        return load_object_folder(source, image_size=size, frames=self.frames, seed=self.seed)
