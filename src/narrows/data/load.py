"""One entry to every kind of images: `load`."""

import difflib
from pathlib import Path
from typing import NamedTuple

from narrows.data.images import Augmentation, ImageData
from narrows.data.scenes import HELD_OUT_RULE, DigitScenes
from narrows.errors import InvalidArgument, MissingExtra
from narrows.validation import check_positive

FOLDER_SIZE = 64


class SceneKind(NamedTuple):
    """How large digit scenes are, and the digits in them.

    Args:
        image_size: side of the square images, unless another is asked for.
        digit_size: least and greatest side of a digit, as shares of it.
    """

    image_size: int
    digit_size: tuple[float, float]


SCENES = {"digits": SceneKind(32, (1 / 2, 5 / 8)), "small_digits": SceneKind(64, (5 / 28, 2 / 7))}


def load(
    data: str | Path = "digits",
    *,
    image_size: int | None = None,
    seed: int = 0,
    unreadable_share: float = 0.01,
    augmentation: Augmentation | None = None,
) -> ImageData:
    """Images to train on and held-out images to judge by.

    Args:
        data: "digits" (scenes with handwritten digits, no download) or "small_digits" (the same with a digit a quarter
            as wide as the scene), or a folder `data/<class>/<image>`, or one with `train/<class>/<image>` and, if you
            have them, `val` and `test` beside `train`. Without those a fifth of the images is held out, by a hash of
            the path, so that a file keeps its part when others are added.
        image_size: side of the square images; by default 32 for digits, 64 for small digits and folders.
        seed: of the training scenes or of the augmentation. Held-out images do not depend on it.
        unreadable_share: how many images of a folder may be unreadable (one may in any case); they are skipped.
        augmentation: how a folder's training images are varied, by default cropped and mirrored.

    Raises:
        InvalidArgument: `data` is a file or does not exist, `image_size` is too small, or digits with `augmentation`.
        DataError: no class folders, no images, a single class, too few or too many unreadable images.
    """
    if str(data) in SCENES:
        if augmentation is not None:
            raise InvalidArgument(
                "augmentation", expected="None for digit scenes, which are drawn anew every epoch", got=augmentation
            )
        return _load_digits(str(data), image_size, seed)
    size = FOLDER_SIZE if image_size is None else image_size
    check_positive(image_size=size)
    close = difflib.get_close_matches(str(data), SCENES, n=1)
    if close and not Path(data).exists():
        expected = f"{' or '.join(map(repr, SCENES))}, or a folder"
        raise InvalidArgument("data", expected=expected, got=repr(str(data)), hint=f"Did you mean {close[0]!r}?")
    try:
        from narrows.data.folder import load_folder
    except ImportError as error:
        raise MissingExtra(error.name or "torchvision", extra="train", purpose="read a folder of images") from error
    return load_folder(
        Path(data),
        image_size=size,
        seed=seed,
        unreadable_share=unreadable_share,
        augmentation=augmentation or Augmentation(),
    )


def load_scenes(name: str, split: str, *, image_size: int | None = None, seed: int = 0) -> DigitScenes:
    """One split of the scenes in `SCENES` that have this name."""
    kind = SCENES[name]
    size = kind.image_size if image_size is None else image_size
    least, greatest = kind.digit_size
    return DigitScenes(split, size=size, digit_size=(size * least, size * greatest), seed=seed)


def _load_digits(name: str, image_size: int | None, seed: int) -> ImageData:
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
