"""Image files, and pictures in tables, as data sets: how they are checked, read and transformed."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path, PurePath
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from narrows.data.decoding import decode_image, why_unreadable
from narrows.data.images import IGNORED, MEAN_AND_STD, Augmentation, ImageData, ImageSet
from narrows.data.listing import (
    HELD_OUT_SHARE,
    PARTS,
    LabelledImages,
    Place,
    Sample,
    find_images,
    list_folder,
    list_table,
    printable,
    say_left_out,
    split,
)
from narrows.data.positions import seed_of
from narrows.data.tables import Data, Table, is_table, open_table
from narrows.errors import DataError, InvalidArgument
from narrows.screen import track
from narrows.validation import check_positive

log = logging.getLogger(__name__)

UNREADABLE_SHARE = 0.01

_AnyPlace = TypeVar("_AnyPlace", bound=Place)


def find_unreadable(paths: Sequence[_AnyPlace], *, allowed_share: float = UNREADABLE_SHARE) -> set[_AnyPlace]:
    """Pictures that cannot be decoded. Each is tried, JPEG at an eighth of its size.

    Raises:
        DataError: more than one, and more than `allowed_share` of all.
    """
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress = track(pool.map(why_unreadable, paths), "checking images", total=len(paths), unit="images")
        faults = {path: fault for path, fault in zip(paths, progress, strict=True) if fault is not None}
    if not faults:
        return set()
    counted = f"{len(faults)} of {len(paths)} images cannot be read"
    examples = "; ".join(f"{printable(str(path))} ({fault})" for path, fault in list(faults.items())[:5])
    if len(faults) > max(1, allowed_share * len(paths)):
        raise DataError(f"{counted}, more than may be skipped ({allowed_share:.0%}, or one): {examples}. Remove them.")
    log.warning("%s and are skipped: %s", counted, examples)
    return set(faults)


class FolderImages(ImageSet):
    """Image files, or pictures in tables, and their labels, resized and normalised.

    With an augmentation, images are cropped and flipped at random, as a pure function of (seed, epoch, index); without,
    they are cropped at the centre.

    Args:
        samples: files or rows, and labels.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
        augmentation: of training images; None crops at the centre.
        seed: of the augmentation.
        root: the folder or table that names of images are relative to, if any.
        prepare: transform of an upright RGB image to a tensor that replaces resizing, augmentation and normalisation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        image_size: int,
        channels: int = 3,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        root: PurePath | None = None,
        prepare: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.samples, self.augmentation, self.seed, self.root = tuple(samples), augmentation, seed, root
        self._transform = prepare or image_transform(image_size, channels, augmentation)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The file or the row, with what cannot be printed as escapes."""
        place = self.samples[index][0]
        inside = str(place) if self.root is None else "/".join(place.parts[len(self.root.parts) :])
        return printable(inside)

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B"]]:
        """Normalised images and labels."""
        images = torch.stack([self._image(index, epoch) for index in indices])
        return images, torch.tensor([self.samples[index][1] for index in indices])

    def _image(self, index: int, epoch: int) -> Tensor:
        path = self.samples[index][0]
        image = decode_image(path, str(path))
        if self.augmentation is None:
            return self._transform(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return self._transform(image)


def image_transform(
    image_size: int, channels: int, augmentation: Augmentation | None = None, *, normalised: bool = True
) -> Callable[[Image.Image], Tensor]:
    """A transform of pictures to square tensors `[channels, image_size, image_size]`.

    Args:
        image_size: side of the square.
        channels: 3, or 1 for grey images.
        augmentation: random crops, flips and more; None resizes and crops at the centre.
        normalised: by mean and spread; else values are in 0..1.
    """
    check_positive(image_size=image_size)
    before, after = ([v2.Resize(image_size), v2.CenterCrop(image_size)], [])
    if augmentation is not None:
        before, after = augmentation.before_normalisation(image_size), augmentation.after_normalisation()
    grey = [v2.Grayscale(channels)] if channels == 1 else []
    normalise = [v2.Normalize(*MEAN_AND_STD[channels])] if normalised else []
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*before, *grey, *to_tensor, *normalise, *after])


def load_folder(
    data: Path | Table, *, image_size: int, seed: int, unreadable_share: float, augmentation: Augmentation
) -> ImageData:
    """The folder or table as `ImageData`; see `narrows.data.load`."""
    listed = list_images(data)
    root = listed.root
    every = [place for samples in (listed.training, *listed.held_out.values()) for place, _ in samples]
    skipped = find_unreadable(every, allowed_share=unreadable_share)
    train = _without(listed.training, skipped)
    if listed.held_out:
        first, last = min(listed.held_out, key=_order), max(listed.held_out, key=_order)
        held_out, test = (_without(listed.held_out[part], skipped) for part in (first, last))
        rule = listed.describe(first)
    else:
        train_root = root / listed.names["training"]
        train, held_out = split(train, root=train_root, classes=listed.classes)
        test = held_out
        hashed = f"the path inside {train_root.name}/" if isinstance(data, Path) else "the number of the row"
        rule = f"{HELD_OUT_SHARE:.0%} of the images, chosen by a hash of {hashed}"
    for name, samples in (("training", train), ("validation", held_out), ("test", test)):
        if not samples:
            raise DataError(f"{root}: no readable image among the {name} images. Add some, or remove the empty part.")
    say_left_out(root, listed.left_out)

    def images(samples: Sequence[Sample], augmentation: Augmentation | None = None) -> FolderImages:
        return FolderImages(samples, image_size=image_size, augmentation=augmentation, seed=seed, root=root)

    validation = images(held_out)
    return ImageData(
        name=str(root),
        train=images(train, augmentation),
        held_out=validation,
        test=validation if test is held_out else images(test),
        classes=listed.classes,
        image_size=image_size,
        channels=3,
        held_out_rule=rule,
        skipped=tuple(sorted(skipped, key=str)),
        left_out=listed.left_out,
    )


def list_images(data: Path | Table) -> LabelledImages:
    """Classes and images of a folder or a table, as `list_folder` and `list_table` find them."""
    if isinstance(data, Table):
        return list_table(data)
    expected = "'digits' or a folder with one folder of images for each class, or hf:<name>"
    if data.is_file():
        hint = "Name the folder that holds the class folders."
        raise InvalidArgument("data", expected=expected, got=f"the file {data}", hint=hint)
    if not data.is_dir():
        got = f"{str(data)!r}, which does not exist"
        raise InvalidArgument("data", expected=expected, got=got, hint="Check the path.")
    return list_folder(data)


def load_unlabelled(
    places: Iterable[Data],
    *,
    image_size: int,
    channels: int,
    root: PurePath | None = None,
    prepare: Callable[[Image.Image], Tensor] | None = None,
) -> FolderImages:
    """Image files, and all in folders and tables, without labels.

    Args:
        places: files, folders, and tables as `narrows.data.load` takes them.
        image_size: side of the images a model takes.
        channels: those a model takes.
        root, prepare: of `FolderImages`.
    """
    found: list[Place] = []
    for known_as_table, group in groupby(places, is_table):
        if known_as_table:
            tables = [open_table(data) for data in group]
            found += [row for table in tables for split in table.splits for row in table.rows(split)]
        else:
            found += find_images(group)
    skipped = find_unreadable(found)
    samples = [(place, IGNORED) for place in found if place not in skipped]
    return FolderImages(samples, image_size=image_size, channels=channels, root=root, prepare=prepare)


def _order(part: str) -> int:
    return list(PARTS).index(part)


def _without(samples: Iterable[Sample], skipped: set[Place]) -> list[Sample]:
    return [sample for sample in samples if sample[0] not in skipped]
