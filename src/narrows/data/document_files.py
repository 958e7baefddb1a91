"""Interleaved documents in files: JSONL beside its images, or webdataset shards."""

import io
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.data.decoding import EXTENSIONS, decode_image
from narrows.data.documents import IMAGE, Document, InterleavedSet
from narrows.data.folder import image_transform
from narrows.errors import DataError

_TEXT = 2**24
"""Bytes of a text in a shard, at most."""


@dataclass(frozen=True)
class StoredImage:
    """An image file, or a member of a shard.

    Args:
        name: for errors.
        path: the file, or the shard.
        offset: its first byte in the shard; None: the whole file.
        size: its number of bytes in the shard.
    """

    name: str
    path: Path
    offset: int | None = None
    size: int = -1

    def read(self) -> bytes:
        """The bytes of the image file."""
        with self.path.open("rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.size)


@dataclass(frozen=True)
class Record:
    """A document whose images have not been read yet.

    Args:
        row: for errors: `train.jsonl, line 7` or `train-000.tar, sample 0042`.
        text: with `IMAGE` in place of each image.
        images: one for each `IMAGE`.
    """

    row: str
    text: str
    images: tuple[StoredImage, ...]

    def __post_init__(self) -> None:
        if (places := self.text.count(IMAGE)) != len(self.images):
            raise DataError(f"{self.row}: {len(self.images)} images, and {places} {IMAGE} in the text")


class StoredDocuments(InterleavedSet):
    """Documents whose images are read, resized and cropped to a square on access.

    Args:
        records: the documents.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
    """

    def __init__(self, records: Sequence[Record], *, image_size: int, channels: int = 3) -> None:
        self.records, self.image_size, self.channels = tuple(records), image_size, channels
        self._transform = image_transform(image_size, channels, normalised=False)

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """File and line or sample."""
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
        return self._transform(decode_image(io.BytesIO(stored.read()), f"{row}: {stored.name}"))


def read_jsonl(path: Path, *, outside: bool = False) -> list[Record]:
    """One document for each line: `{"text": "A cat: <image>", "images": ["cat.png"]}`, files beside the JSONL file.

    Args:
        path: the JSONL file.
        outside: whether its images may stand outside its folder, as "../cat.png" or "/pictures/cat.png". Documents of
            somebody else could otherwise make any image of the disk a part of the training data. (Links inside the
            folder are followed.)

    Raises:
        DataError: a line that is not of this form, or names an image file that does not exist or stands outside.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = f"{path}, line {number}"
        text, names = _parsed(line, row)
        files = [path.parent / (name if outside else os.path.normpath(name)) for name in names]
        for name, file in zip(names, files, strict=True):
            normal = os.path.normpath(name)
            if not outside and (os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir):
                raise DataError(
                    f"{row}: the image {name} stands outside the folder of {path.name}. "
                    "If you trust this file, allow it with outside=True (--data.outside true)."
                )
            if not os.path.isfile(file):
                raise DataError(f"{row}: the image {name} does not exist beside {path.name}")
        records.append(Record(row, text, tuple(map(StoredImage, names, files))))
    return records


def read_shards(paths: Iterable[Path]) -> list[Record]:
    """The samples of webdataset shards: files of a tar archive that share their name up to the first dot.

    A sample is `key.json`, in the form of a line of `read_jsonl` (by default `images` are all images of the sample, in
    order of their names), or `key.txt`, the caption of the one image beside it. Only the headers of an archive are read
    here: images are read in place, so that documents keep the random access that exact resume needs.

    Raises:
        DataError: a file that is not a tar archive, or a malformed sample.
    """
    records = []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as shard:
                records += list(_samples(shard, path))
        except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
            raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
    return records


def _samples(shard: tarfile.TarFile, path: Path) -> Iterable[Record]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    length = path.stat().st_size
    for member in shard:
        if member.issparse() or member.offset_data + (member.size if member.isfile() else 0) > length:
            raise DataError(f"{path}: {member.name} claims {member.size:,} bytes, more than there are")
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile() and extension:
            samples[f"{folder}/{key}".lstrip("/")][extension] = member
    for key, members in samples.items():
        row = f"{path}, sample {key}"
        pictures = sorted((name for name in members if f".{name}".lower().endswith(EXTENSIONS)), key=_numeric_order)
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
    if member.size > _TEXT:
        raise DataError(f"{shard.name}: {member.name} has {member.size:,} bytes, and texts at most {_TEXT:,}")
    file = shard.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8")


def _parsed(line: str, row: str, default: Sequence[str] = ()) -> tuple[str, Sequence[str]]:
    """The text, and the names of its images."""
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{row}: not JSON: {error}") from error
    text, names = (entry.get("text"), entry.get("images", default)) if isinstance(entry, dict) else (None, ())
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not isinstance(text, str) or not listed:
        raise DataError(f'{row}: expected {{"text": "... {IMAGE} ...", "images": ["file", ...]}}, got {line[:80]}')
    return text, names


def _numeric_order(name: str) -> list[int | str]:
    """A sort key: 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
