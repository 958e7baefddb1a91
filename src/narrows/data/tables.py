"""Tables of the `datasets` library: how they are opened, and which of their columns hold pictures and classes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

from narrows.errors import DataError, InvalidType, MissingExtra

PREFIX = "hf:"
"""What names of data sets on the Hugging Face hub begin with."""

Data = str | Path | Any
"""Where labelled images come from: a name, a folder, or a `Dataset` or `DatasetDict` of the `datasets` library."""

KINDS = {"Image": "pictures", "ClassLabel": "classes"}
"""The types of columns that are read, and what they hold."""

MASKS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "instances", "label", "labels")
"""What a second column of pictures is called that holds the masks of the objects in the first."""


@dataclass(frozen=True, order=True)
class Row:
    """A picture in a table, where a folder has a file: it has a name and parts as a `Path` has.

    Args:
        index: its number.
        parts: the names of its table and split, and its number.
        pictures: a `datasets.Dataset` with one column of pictures, undecoded.
    """

    index: int
    parts: tuple[str, ...]
    pictures: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return str(PurePath(*self.parts))

    def open(self) -> Path | BytesIO:
        """Its bytes, or the file that the table names.

        Raises:
            ValueError: the row has neither.
        """
        (cell,) = self.pictures[self.index].values()
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ValueError("the row holds no picture")
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])


@dataclass(frozen=True)
class Table:
    """A data set of the `datasets` library.

    Args:
        root: what it is called.
        splits: its `Dataset`s by their names.
    """

    root: PurePath
    splits: Mapping[str, Any]

    def column(self, split: str, kind: str, *, but: str | None = None) -> str:
        """The one column of a split, `but` left out, that is of a type in `KINDS`.

        Raises:
            DataError: there is none, or several.
        """
        columns = self._kinds(split)
        found = [name for name, of_kind in columns.items() if of_kind == kind and name != but]
        if len(found) == 1:
            return found[0]
        has = f"{self.root}, split {split}"
        if found:
            raise DataError(
                f"{has}, has {len(found)} columns of {KINDS[kind]}: {', '.join(found)}. Remove all but one from it: "
                f"dataset.remove_columns({found[1:]})."
            )
        make = "class_encode_column(name)" if kind == "ClassLabel" else "cast_column(name, datasets.Image())"
        known = ", ".join(f"{name} ({of_kind})" for name, of_kind in columns.items()) or "no column at all"
        raise DataError(
            f"{has}, has no column of {KINDS[kind]}, of type {kind}, but {known}. dataset.{make} makes one."
        )

    def has_classes(self, split: str) -> bool:
        """Whether a split has a column of classes."""
        return "ClassLabel" in self._kinds(split).values()

    def rows(self, split: str) -> list[Row]:
        """The pictures of a split."""
        return self._rows(split, self.column(split, "Image"))

    def rows_and_masks(self, split: str) -> tuple[list[Row], list[Row]]:
        """The pictures of a split, and the masks in a second column of pictures, called as in `MASKS`; or none."""
        columns = self._kinds(split)
        masks = next((name for name, kind in columns.items() if kind == "Image" and name.lower() in MASKS), None)
        images = self.column(split, "Image", but=masks)
        return self._rows(split, images), [] if masks is None else self._rows(split, masks)

    def _kinds(self, split: str) -> dict[str, str]:
        """The type of each column of a split, by its name."""
        return {name: type(feature).__name__ for name, feature in self.splits[split].features.items()}

    def _rows(self, split: str, column: str) -> list[Row]:
        from datasets import Image

        pictures = self.splits[split].with_format(None).select_columns([column])
        pictures = pictures.cast_column(column, Image(decode=False))
        return [Row(index, (*self.root.parts, split, str(index)), pictures) for index in range(len(pictures))]

    def classes(self, split: str) -> list[str | None]:
        """The name of the class of each row of a split; None of a row, or a split, without."""
        table = self.splits[split].with_format(None)
        if not self.has_classes(split):
            return [None] * len(table)
        column = self.column(split, "ClassLabel")
        labels, names = table.select_columns([column])[:][column], table.features[column].names
        return [None if label is None or label < 0 else names[label] for label in labels]


def is_table(data: Data) -> bool:
    """Whether this is a table: "hf:<name>", a folder that `save_to_disk` wrote, or an object of `datasets`."""
    if isinstance(data, str | Path):
        return str(data).startswith(PREFIX) or _is_saved(Path(data))
    return isinstance(data, Table) or type(data).__module__.partition(".")[0] == "datasets"


def data_name(data: Data) -> str:
    """What data are called: a table from Python by the fingerprint of its rows."""
    if isinstance(data, Table):
        return str(data.root)
    if isinstance(data, Mapping):
        marks = [str(getattr(table, "_fingerprint", ""))[:8] for table in data.values()]
        return f"<{type(data).__name__} {'-'.join(marks)}>"
    mark = getattr(data, "_fingerprint", None)
    return str(data) if mark is None else f"<{type(data).__name__} {str(mark)[:8]}>"


def opened(data: Data) -> Data:
    """A table opened, that it need not be again; all else as it is."""
    return open_table(data) if is_table(data) else data


def open_table(data: Data) -> Table:
    """The table that `is_table` told; code of a data set is never run.

    Args:
        data: "hf:<name>", "hf:<name>:<configuration>", a folder that `save_to_disk` wrote, an object of `datasets`.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: it cannot be loaded.
        InvalidType: an object of another kind, a stream say.
    """
    if isinstance(data, Table):
        return data
    try:
        import datasets
    except ImportError as error:
        purpose = f"read {str(data)!r}"
        raise MissingExtra(error.name or "datasets", extra="datasets", purpose=purpose) from error
    loaded = _loaded(str(data)) if isinstance(data, str | Path) else data
    if isinstance(loaded, datasets.DatasetDict):
        return Table(PurePath(data_name(data)), {str(split): rows for split, rows in loaded.items()})
    if isinstance(loaded, datasets.Dataset):
        return Table(PurePath(data_name(data)), {str(loaded.split or "rows"): loaded})
    expected, got = "a Dataset or DatasetDict", f"an object of the class {type(loaded).__name__}"
    raise InvalidType("data", expected=expected, got=got, hint="Load it without streaming=True.")


def _is_saved(folder: Path) -> bool:
    saved: Sequence[tuple[str, ...]] = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
    return any(all((folder / name).is_file() for name in names) for names in saved)


def _loaded(name: str) -> Any:
    """The data set of a name or in a folder."""
    import datasets

    place = name.removeprefix(PREFIX)
    with _without_bars():
        try:
            if _is_saved(Path(place)):
                return datasets.load_from_disk(place)
            path, _, configuration = place.partition(":")
            return datasets.load_dataset(path, configuration or None)
        except Exception as error:  # a network, a parser and a file system raise anything
            reason = " ".join(str(error).split())
            raise DataError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Bars of `datasets` are for terminals."""
    import datasets

    silenced = not datasets.are_progress_bars_disabled() and not (sys.stderr is not None and sys.stderr.isatty())
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()
