"""The images that a token reduction is judged by, as the model takes them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from narrows.data import IGNORED, ImageSet, load
from narrows.data.decoding import EXTENSIONS
from narrows.data.folder import FolderImages, find_unreadable, list_images, load_unlabelled
from narrows.data.listing import PARTS, say_left_out, walk
from narrows.data.scenes import SCENES
from narrows.data.tables import Data, Table, is_table, open_table
from narrows.errors import DataError, InvalidArgument
from narrows.hub.models import LoadedModel


@dataclass(frozen=True)
class Images:
    """Images to judge by.

    Args:
        images: all of them.
        chosen: which of them are looked at.
        rule: in words, which these are.
        labelled: whether their labels are outputs of the model.
        classes: what labels are called.
    """

    images: ImageSet
    chosen: tuple[int, ...]
    rule: str
    labelled: bool = False
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, positions: Sequence[int]) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B"]]:
        """Images and labels at these places of `chosen`."""
        return self.images.batch([self.chosen[position] for position in positions])

    def batches(self, size: int) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, "B"]]]:
        """All of them, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    def names(self, positions: Sequence[int]) -> list[str]:
        """What to write beside a picture: the class where there is one, else the file."""
        labels = self.batch(positions)[1].tolist() if self.labelled else [IGNORED] * len(positions)
        return [
            self.classes[label] if label != IGNORED else Path(self.images.name(self.chosen[position])).name
            for position, label in zip(positions, labels, strict=True)
        ]


def load_images(data: Data, model: LoadedModel, *, limit: int) -> Images:
    """The images in `data` for a model, at most `limit`, evenly spread over all there are.

    Of a model of narrows, which may have been trained on them, only held-out images are looked at (see
    `narrows.data.load`); of other models every image of the validation part, the test part or else the training part. A
    folder has one folder of images for each class, a table a column of them, and then gives accuracy too, where the
    classes can be told to be the model's: by their names (ImageNet's WordNet ids among them), or, where the model has
    no names for them, by being as many. A folder without classes is searched in depth, and a table in all its splits.

    Args:
        data: "digits", "small_digits", or a folder or a table of images, as `narrows.data.load` takes them.
        model: the model.
        limit: at most so many images.

    Raises:
        InvalidArgument: `data` does not exist, holds no image, names digit scenes for a model that takes colour, or has
            other classes than a model of narrows was trained on.
        DataError: images that cannot be read.
    """
    data = check_data(data)
    if isinstance(data, str) and (model.prepare is not None or model.channels != 1):
        got = f"{str(data)!r}, which are grey"
        raise InvalidArgument("data", expected="a folder of images", got=got, hint=f"{model.name} takes colour.")
    if isinstance(data, str) or (model.prepare is None and _has_classes(data)):
        found = _held_out(data, model)
    elif _has_classes(data):
        found = _labelled(data, model)
    else:
        found = _unlabelled(data, model)
    return replace(found, chosen=evenly_spaced(len(found.images), limit))


def check_data(data: Data) -> str | Path | Table:
    """The name of digit scenes, a folder with images, or the table that `data` names, opened.

    Raises:
        InvalidArgument: none of these.
        DataError: a table that cannot be opened, or has no pictures.
    """
    if isinstance(data, str | Path) and str(data) in SCENES:
        return str(data)
    if is_table(data):
        table = open_table(data)
        for split in table.splits:
            table.column(split, "Image")
        return table
    root = Path(data)
    if not root.is_dir():
        raise InvalidArgument(
            "data",
            expected=f"{', '.join(map(repr, SCENES))} or a folder of images",
            got=f"{str(data)!r}, which is no folder",
            hint="Data sets of the Hugging Face hub are called hf:<name>.",
        )
    if not walk(root).files:
        expected = f"a folder with images ({', '.join(EXTENSIONS)})"
        raise InvalidArgument("data", expected=expected, got=f"{str(data)!r}, which has none")
    return root


def evenly_spaced(count: int, limit: int) -> tuple[int, ...]:
    """At most `limit` of `count` indices, evenly spaced.

    >>> evenly_spaced(10, 4)
    (0, 2, 5, 7)
    """
    return tuple(range(count)) if count <= limit else tuple(index * count // limit for index in range(limit))


def _held_out(data: str | Path | Table, model: LoadedModel) -> Images:
    loaded = load(data, image_size=model.size[0])
    if loaded.channels != model.channels:
        raise InvalidArgument("data", expected=f"images of {model.channels} channels", got=f"{loaded.channels}")
    if model.classes and model.classes != loaded.classes:
        raise InvalidArgument(
            "data",
            expected=f"the classes that {model.name} was trained on, {_shown(model.classes)}",
            got=f"{_shown(loaded.classes)} in {loaded.name}",
            hint="Rename the folders of classes as they were, or name a folder without classes.",
        )
    fits = loaded.num_classes == model.num_classes
    return Images(
        loaded.held_out, (), f"held out: {loaded.held_out_rule}", labelled=fits, classes=loaded.classes if fits else ()
    )


def _shown(classes: Sequence[str]) -> str:
    return f"{len(classes)}: {', '.join(map(repr, classes[:6]))}{' and more' if len(classes) > 6 else ''}"


def _has_classes(data: Path | Table) -> bool:
    """Whether a table has a column of classes, or a folder its images in more than one folder and none beside them."""
    if isinstance(data, Table):
        return any(data.has_classes(split) for split in data.splits)
    files = walk(data).files
    return all(len(names) > 1 for names in files) and len({names[0] for names in files}) > 1


def _labelled(data: Path | Table, model: LoadedModel) -> Images:
    listed = list_images(data)
    part = min(listed.held_out, key=list(PARTS).index, default="training")
    samples, classes = listed.held_out.get(part, listed.training), listed.classes
    labels = _labels(classes, model)
    skipped = find_unreadable([place for place, _ in samples])
    kept = [(place, IGNORED if labels is None else labels[label]) for place, label in samples if place not in skipped]
    rule = f"every image in {listed.describe(part)}"
    if labels is None:
        rule += f", whose {len(classes)} classes cannot be told to be among the model's {model.num_classes}"
    say_left_out(listed.root, listed.left_out)
    images = FolderImages(
        kept, image_size=model.size[0], channels=model.channels, root=listed.root, prepare=model.prepare
    )
    return Images(images, (), rule, labelled=labels is not None, classes=model.classes or classes)


def _labels(classes: Sequence[str], model: LoadedModel) -> list[int] | None:
    """Which output each class is; None if that cannot be told."""
    outputs = {name.lower(): index for index, name in enumerate(model.classes)}
    if all(name.lower() in outputs for name in classes):
        return [outputs[name.lower()] for name in classes]
    named = any(re.fullmatch(r"LABEL_\d+", name) is None for name in model.classes)  # transformers numbers unnamed ones
    return list(range(len(classes))) if len(classes) == model.num_classes and not named else None


def _unlabelled(data: Path | Table, model: LoadedModel) -> Images:
    root = data.root if isinstance(data, Table) else data
    images = load_unlabelled(
        [data], image_size=model.size[0], channels=model.channels, root=root, prepare=model.prepare
    )
    if not len(images):
        raise DataError(f"{root}: none of the images can be read.")
    return Images(images, (), f"every image in {root.name}/, which has no labels")
