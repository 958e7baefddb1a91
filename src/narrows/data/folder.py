"""Image files: which there are, their classes and splits, and how they are read and transformed."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm.auto import tqdm

from narrows.data.decoding import decode_image, why_unreadable
from narrows.data.images import HELD_OUT_NAMES, IGNORED, MEAN_AND_STD, Augmentation, ImageData, ImageSet
from narrows.data.positions import keys
from narrows.errors import DataError, InvalidArgument
from narrows.validation import check_positive

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2
UNREADABLE_SHARE = 0.01

Sample = tuple[Path, int]


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among these paths and in these folders at any depth, in a fixed order.

    Raises:
        InvalidArgument: a path that does not exist, or no image file at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InvalidArgument("images", expected="image files or folders", got=f"{path}, which does not exist")
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        found += inside if path.is_dir() else [path]
    if not found:
        raise InvalidArgument("images", expected=f"files ending in {', '.join(IMG_EXTENSIONS)}", got="none")
    return found


def list_classes(root: Path) -> tuple[list[str], list[Sample]]:
    """Classes and samples of a tree with one folder for each class, without hidden and empty folders.

    Raises:
        DataError: no class folders, no images, or a single class.
    """
    advice = f"Expected {root}/<class>/<image>, at least two classes, files ending in {', '.join(IMG_EXTENSIONS)}."
    if not any(child.is_dir() for child in root.iterdir()):
        raise DataError(f"{root} holds no class folders. {advice}")
    named = _named_samples(root)
    classes = sorted({name for _, name in named})
    if not classes:
        raise DataError(f"{root}: no image in any class folder. {advice}")
    if len(classes) == 1:
        raise DataError(f"{root} holds a single class with images, {classes[0]!r}: nothing to tell apart. {advice}")
    return classes, [(path, classes.index(name)) for path, name in named]


def list_known_classes(root: Path, classes: Sequence[str]) -> list[Sample]:
    """The samples of a tree with one folder for each class; labels are indices into `classes`.

    Raises:
        DataError: a class that is not among `classes`.
    """
    named = _named_samples(root)
    unknown = sorted({name for _, name in named} - set(classes))
    if unknown:
        raise DataError(
            f"{root} holds classes that the training images do not: {', '.join(unknown)}. Rename or remove them."
        )
    return [(path, classes.index(name)) for path, name in named]


def split(samples: Sequence[Sample], *, root: Path, classes: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples: a fifth is held out by the hash of the path inside `root`.

    A file thereby stays in its split when others are added or removed. Each class keeps at least one file in each
    split: the one with the smallest hash is held out, the one with the greatest trained on.

    Raises:
        DataError: a class with fewer than two images.
    """
    train: list[Sample] = []
    held_out: list[Sample] = []
    for label, name in enumerate(classes):
        files = sorted((_hash(path.relative_to(root)), path) for path, of_class in samples if of_class == label)
        if len(files) < 2:
            raise DataError(
                f"{root}: class {name!r} has {len(files)} readable image(s) and needs at least 2, one to train on and "
                "one to hold out. Add images or remove the folder."
            )
        below = sum(value < HELD_OUT_SHARE for value, _ in files)
        count = min(max(below, 1), len(files) - 1)
        held_out += sorted((path, label) for _, path in files[:count])
        train += sorted((path, label) for _, path in files[count:])
    return train, held_out


def find_unreadable(paths: Sequence[Path], *, allowed_share: float = UNREADABLE_SHARE) -> set[Path]:
    """Files that cannot be decoded. Each is tried, JPEG at an eighth of its size.

    Raises:
        DataError: more than one, and more than `allowed_share` of all.
    """
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress = tqdm(
            pool.map(why_unreadable, paths), total=len(paths), desc="Checking images", leave=False, disable=None
        )
        faults = {path: fault for path, fault in zip(paths, progress, strict=True) if fault is not None}
    if not faults:
        return set()
    counted = f"{len(faults)} of {len(paths)} images cannot be read"
    examples = "; ".join(f"{path} ({fault})" for path, fault in list(faults.items())[:5])
    if len(faults) > max(1, allowed_share * len(paths)):
        raise DataError(f"{counted}, more than may be skipped ({allowed_share:.0%}, or one): {examples}. Remove them.")
    log.warning("%s and are skipped: %s", counted, examples)
    return set(faults)


def _named_samples(root: Path) -> list[tuple[Path, str]]:
    listed = ImageFolder(root, allow_empty=True)
    return [(Path(path), listed.classes[label]) for path, label in listed.samples if listed.classes[label][0] != "."]


def _hash(path: Path) -> float:
    """A number in [0, 1), a pure function of the path."""
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") / 2**64


class FolderImages(ImageSet):
    """Image files and their labels, resized and normalised.

    With an augmentation, images are cropped and flipped at random, as a pure function of (seed, epoch, index); without,
    they are cropped at the centre.

    Args:
        samples: files and labels.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
        augmentation: of training images; None crops at the centre.
        seed: of the augmentation.
        root: the folder that names of images are relative to, if any.
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
        root: Path | None = None,
        prepare: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.samples, self.augmentation, self.seed, self.root = tuple(samples), augmentation, seed, root
        self._transform = prepare or image_transform(image_size, channels, augmentation)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The file."""
        path = self.samples[index][0]
        return (path if self.root is None else path.relative_to(self.root)).as_posix()

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
            torch.default_generator.manual_seed(int(keys(self.seed, epoch, index)[0] >> 1))
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
    root: Path, *, image_size: int, seed: int, unreadable_share: float, augmentation: Augmentation
) -> ImageData:
    """The folder as `ImageData`; see `narrows.data.load`."""
    _check_is_folder(root)
    listed = {name: folder for name in ("train", *HELD_OUT_NAMES) if (folder := _part(root, name)) is not None}
    train_root = listed.pop("train", root)
    classes, train = list_classes(train_root)
    others = {} if train_root == root else {name: list_known_classes(at, classes) for name, at in listed.items()}

    every = [path for samples in (train, *others.values()) for path, _ in samples]
    skipped = find_unreadable(every, allowed_share=unreadable_share)
    train = _without(train, skipped)
    if others:
        held_out, test = (_without(others[name], skipped) for name in (min(others, key=_rank), max(others, key=_rank)))
        rule = f"the folder {min(others, key=_rank)}/"
    else:
        train, held_out = split(train, root=train_root, classes=classes)
        test = held_out
        rule = f"{HELD_OUT_SHARE:.0%} of the images, chosen by a hash of the path inside {train_root.name}/"
    for name, samples in (("training", train), ("validation", held_out), ("test", test)):
        if not samples:
            raise DataError(f"{root}: no readable image among the {name} images. Add some, or remove the empty folder.")

    def images(samples: Sequence[Sample], augmentation: Augmentation | None = None) -> FolderImages:
        return FolderImages(samples, image_size=image_size, augmentation=augmentation, seed=seed, root=root)

    validation = images(held_out)
    return ImageData(
        name=str(root),
        train=images(train, augmentation),
        held_out=validation,
        test=validation if test is held_out else images(test),
        classes=tuple(classes),
        image_size=image_size,
        channels=3,
        held_out_rule=rule,
        skipped=tuple(sorted(skipped)),
    )


def load_unlabelled(paths: Iterable[str | Path], *, image_size: int, channels: int) -> FolderImages:
    """Image files, and all in folders, without labels, for a model of this image size and number of channels."""
    files = find_images(paths)
    skipped = find_unreadable(files)
    samples = [(file, IGNORED) for file in files if file not in skipped]
    return FolderImages(samples, image_size=image_size, channels=channels)


def _check_is_folder(root: Path) -> None:
    expected = "'digits' or a folder with one folder of images for each class"
    if root.is_file():
        raise InvalidArgument(
            "data", expected=expected, got=f"the file {root}", hint="Name the folder that holds the class folders."
        )
    if not root.is_dir():
        raise InvalidArgument(
            "data", expected=expected, got=f"{str(root)!r}, which does not exist", hint="Check the path."
        )


def _part(root: Path, name: str) -> Path | None:
    """`root/name` if it holds class folders; a folder that holds images is a class itself."""
    folder = root / name
    return folder if folder.is_dir() and any(child.is_dir() for child in folder.iterdir()) else None


def _rank(name: str) -> int:
    return HELD_OUT_NAMES.index(name)


def _without(samples: Iterable[Sample], skipped: set[Path]) -> list[Sample]:
    return [sample for sample in samples if sample[0] not in skipped]
