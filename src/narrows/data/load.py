"""One entry to every kind of labelled images: `load`."""

import difflib
from pathlib import Path

from narrows.data.images import Augmentation, ImageData
from narrows.data.scenes import SCENES, load_digits
from narrows.data.tables import Data, is_table, open_table
from narrows.errors import InvalidArgument, InvalidType, MissingExtra
from narrows.validation import check_positive

FOLDER_SIZE = 64


def load(
    data: Data = "digits",
    *,
    image_size: int | None = None,
    seed: int = 0,
    unreadable_share: float = 0.01,
    augmentation: Augmentation | None = None,
) -> ImageData:
    """Images to train on and held-out images to evaluate on.

    Args:
        data: "digits" (scenes with handwritten digits, no download) or "small_digits" (the same with a digit a quarter
            as wide as the scene), or a folder `data/<class>/<image>`, or one with `train/<class>/<image>` and, if you
            have them, `val` and `test` beside `train`, as they are usually called (`Training`, `test_set`, `val2017`).
            Without those a fifth of the images is held out, by a hash of the path, so that a file stays in its split
            when others are added. Or a table of the `datasets` library with a column of type `Image` and one of type
            `ClassLabel`, and splits of these names: "hf:<name>" or "hf:<name>:<configuration>" of the Hugging Face hub,
            a folder that `save_to_disk` wrote, a `Dataset` or a `DatasetDict`.
        image_size: side of the square images; by default 32 for digits, 64 for small digits and all else.
        seed: of the training scenes or of the augmentation. Held-out images do not depend on it.
        unreadable_share: the share of the images that may be unreadable (one may in any case); they are skipped.
        augmentation: of training images; by default random crops and flips.

    Raises:
        InvalidArgument: `data` is a file or does not exist, `image_size` is too small, or digits with `augmentation`.
        InvalidType: `data` is none of these.
        DataError: no class folders, no images, a single class, too few or too many unreadable images, or folders that
            could be classes or parts; a table without a column of pictures or classes, or that cannot be loaded.
        MissingExtra: a table, without `datasets` installed.
    """
    table = open_table(data) if is_table(data) else None
    if table is None and not isinstance(data, str | Path):
        raise InvalidType("data", expected="a name, a folder, a Dataset or a DatasetDict", got=type(data).__name__)
    if str(data) in SCENES:
        if augmentation is not None:
            raise InvalidArgument(
                "augmentation", expected="None for digit scenes, which are drawn anew every epoch", got=augmentation
            )
        return load_digits(str(data), image_size=image_size, seed=seed)
    size = FOLDER_SIZE if image_size is None else image_size
    check_positive(image_size=size)
    close = difflib.get_close_matches(str(data), SCENES, n=1) if table is None else []
    if close and not Path(data).exists():
        expected = f"{' or '.join(map(repr, SCENES))}, or a folder"
        raise InvalidArgument("data", expected=expected, got=repr(str(data)), hint=f"Did you mean {close[0]!r}?")
    try:
        from narrows.data.folder import load_folder
    except ImportError as error:
        raise MissingExtra(error.name or "torchvision", extra="train", purpose="read a folder of images") from error
    return load_folder(
        table or Path(data),
        image_size=size,
        seed=seed,
        unreadable_share=unreadable_share,
        augmentation=augmentation or Augmentation(),
    )
