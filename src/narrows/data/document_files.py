"""Interleaved documents on a disk: a JSONL file beside its images, or webdataset shards."""

import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from narrows.data.documents import IMAGE, Document, InterleavedSet
from narrows.errors import DataError
from narrows.validation import check_positive


@dataclass(frozen=True)
class StoredImage:
    """An image file, or a member of a shard.

    Args:
        name: what it is called in errors.
        path: the file, or the shard.
        offset: where in the shard it begins; None: it is all of the file.
        size: its bytes in the shard.
    """

    name: str
    path: Path
    offset: int | None = None
    size: int = -1

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.size)


@dataclass(frozen=True)
class Record:
    """A document that has not been read yet.

    Args:
        row: where it stands, as `train.jsonl, line 7` or `train-000.tar, sample 0042`.
        text: with `IMAGE` where an image stands.
        images: one for each `IMAGE`.
    """

    row: str
    text: str
    images: tuple[StoredImage, ...]

    def __post_init__(self) -> None:
        if (places := self.text.count(IMAGE)) != len(self.images):
            raise DataError(f"{self.row}: {len(self.images)} images, and {places} {IMAGE} in the text")


class StoredDocuments(InterleavedSet):
    """Documents whose images are read, resized and cropped to a square when asked for.

    Args:
        records: what there is.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
    """

    def __init__(self, records: Sequence[Record], *, image_size: int, channels: int = 3) -> None:
        self.records, self.image_size, self.channels = tuple(records), image_size, channels
        self._transform = picture_transform(image_size, channels)

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """The row."""
        return self.records[index].row

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These documents.

        Raises:
            DataError: an image that cannot be read; it names the row and the file.
        """
        return [self._document(self.records[index]) for index in indices]

    def _document(self, record: Record) -> Document:
        images = [self._image(record.row, image) for image in record.images]
        empty = torch.zeros(0, self.channels, self.image_size, self.image_size)
        return Document(record.text, torch.stack(images) if images else empty)

    def _image(self, row: str, stored: StoredImage) -> Tensor:
        try:
            with Image.open(io.BytesIO(stored.read())) as image:
                return self._transform(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # a broken file makes decoders raise anything
            raise DataError(
                f"{row}: {stored.name} cannot be read as an image: {type(error).__name__}: {error}"
            ) from error


def picture_transform(image_size: int, channels: int) -> Callable[[Image.Image], Tensor]:
    """The middle square of a picture as `[channels, image_size, image_size]` in 0..1."""
    check_positive(image_size=image_size)
    grey = [v2.Grayscale()] if channels == 1 else []
    parts = [v2.Resize(image_size), v2.CenterCrop(image_size), *grey, v2.PILToTensor()]
    return v2.Compose([*parts, v2.ToDtype(torch.float32, scale=True)])


def read_jsonl(path: Path) -> list[Record]:
    """One document for each line: `{"text": "A cat: <image>", "images": ["cat.png"]}`, files beside the JSONL file.

    Raises:
        DataError: a line that is not of this form, or names an image file that does not exist.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = f"{path}, line {number}"
        text, names = _parsed(line, row)
        for name in names:
            if not (path.parent / name).is_file():
                raise DataError(f"{row}: the image {name} does not exist beside {path.name}")
        records.append(Record(row, text, tuple(StoredImage(name, path.parent / name) for name in names)))
    return records


def read_shards(paths: Iterable[Path]) -> list[Record]:
    """The samples of webdataset shards: files of a tar archive that share their name up to the first dot.

    A sample is `key.json`, as a line of `read_jsonl` (without `images` they are the sample's own, in the order of their
    names), or `key.txt`, the caption of the one image beside it. Only the headers of an archive are read here, images
    when they are asked for, from where they stand in it.

    Raises:
        DataError: a file that is no tar archive, or a sample of another form.
    """
    records = []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as shard:
                records += list(_samples(shard, path))
        except tarfile.TarError as error:
            raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
    return records


def _samples(shard: tarfile.TarFile, path: Path) -> Iterable[Record]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    for member in shard:
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile() and extension:
            samples[f"{folder}/{key}".lstrip("/")][extension] = member
    for key, members in samples.items():
        row = f"{path}, sample {key}"
        pictures = sorted((name for name in members if f".{name}".lower().endswith(IMG_EXTENSIONS)), key=_counting)
        if "json" in members:
            text, names = _parsed(_content(shard, members["json"]), row, default=pictures)
        elif "txt" in members:
            text, names = IMAGE + _content(shard, members["txt"]), pictures
        else:
            raise DataError(f"{row}: neither {key}.json nor {key}.txt among {sorted(members)}")
        if missing := [name for name in names if name not in members]:
            raise DataError(f"{row}: the image {missing[0]} is not among {sorted(members)}")
        images = (StoredImage(members[n].name, path, members[n].offset_data, members[n].size) for n in names)
        yield Record(row, text, tuple(images))


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8")


def _parsed(line: str, row: str, default: Sequence[str] = ()) -> tuple[str, Sequence[str]]:
    """Text and names of images."""
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{row}: not JSON: {error}") from error
    text, names = (entry.get("text"), entry.get("images", default)) if isinstance(entry, dict) else (None, ())
    if not isinstance(text, str) or not all(isinstance(name, str) for name in names):
        raise DataError(f'{row}: expected {{"text": "... {IMAGE} ...", "images": ["file", ...]}}, got {line[:80]}')
    return text, names


def _counting(name: str) -> list[int | str]:
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
