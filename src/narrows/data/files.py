"""Which image files there are, which of them can be read, and which are held out."""

import hashlib
import logging
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from narrows.errors import DataError, InvalidArgument

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2
UNREADABLE_SHARE = 0.01

Sample = tuple[Path, int]


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among these paths, folders searched in depth, in a fixed order.

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
    """Classes and samples of a class-per-folder tree, as torchvision lists them; hidden and empty folders are left out.

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
    """The samples of a class-per-folder tree, labels counted in `classes`.

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
    """Training and held-out samples: held out is a file whose path inside `root` hashes into the first fifth.

    So a file keeps its part when others are added or removed. In a class where no file or all of them would be held
    out, the one with the least hash is held out, or the one with the greatest is trained on.

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
    """Files that do not decode: each is tried here, JPEG at an eighth of its size.

    Raises:
        DataError: they are more than `allowed_share` of all, and more than one.
    """
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress = tqdm(pool.map(_fault, paths), total=len(paths), desc="Checking images", leave=False, disable=None)
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
    """A number in [0, 1) that depends on the path only."""
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") / 2**64


def _fault(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # a broken file makes decoders raise anything
        return f"{type(error).__name__}: {error}"
    return None
