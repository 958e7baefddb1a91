"""One entry to every kind of images: `load`."""

import difflib
from pathlib import Path

from narrows.data import digit_canvas, digits
from narrows.data.augmentation import Augmentation
from narrows.data.image_set import ImageData
from narrows.errors import InvalidArgument, MissingExtra
from narrows.validation import check_positive

DIGITS_SIZE, FOLDER_SIZE = 32, 64


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
        data: "digits" (scenes with handwritten digits, no download), or a folder `data/<class>/<image>`, or one with
            `train/<class>/<image>` and, if you have them, `val` and `test` beside `train`. Without those a fifth of
            the images is held out, by a hash of the path, so that a file keeps its part when others are added.
        image_size: side of the square images; by default 32 for digits and 64 for folders.
        seed: of the training scenes or of the augmentation. Held-out images do not depend on it.
        unreadable_share: how many images of a folder may be unreadable (one may in any case); they are skipped.
        augmentation: how a folder's training images are varied, by default cropped and mirrored.

    Raises:
        InvalidArgument: `data` is a file or does not exist, `image_size` is too small, or digits with `augmentation`.
        DataError: no class folders, no images, a single class, too few or too many unreadable images.
    """
    if str(data) == "digits":
        if augmentation is not None:
            raise InvalidArgument(
                "augmentation", expected="None for digit scenes, which are drawn anew every epoch", got=augmentation
            )
        return _load_digits(DIGITS_SIZE if image_size is None else image_size, seed)
    size = FOLDER_SIZE if image_size is None else image_size
    check_positive(image_size=size)
    close = difflib.get_close_matches(str(data), ["digits"])
    if close and not Path(data).exists():
        raise InvalidArgument(
            "data", expected="'digits' or a folder", got=repr(str(data)), hint="Did you mean 'digits'?"
        )
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


def _load_digits(size: int, seed: int) -> ImageData:
    held_out = digits.DigitScenes("held_out", size=size)
    return ImageData(
        name="digits",
        train=digits.DigitScenes("train", size=size, seed=seed),
        held_out=held_out,
        test=held_out,
        classes=tuple("0123456789"),
        image_size=size,
        channels=1,
        held_out_rule=digit_canvas.HELD_OUT_RULE,
    )
