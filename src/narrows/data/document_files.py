"""Interleaved documents in files: JSONL beside its images, or webdataset shards."""

import codecs
import io
import json
import logging
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
from narrows.data.documents import IMAGE, Document, InterleavedSet, Message, text_of
from narrows.data.folder import UNREADABLE_SHARE, image_transform
from narrows.data.listing import say_left_out
from narrows.errors import DataError

log = logging.getLogger(__name__)

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
        messages: the conversation whose contents are the text; empty: there is none.
    """

    row: str
    text: str
    images: tuple[StoredImage, ...]
    messages: tuple[Message, ...] = ()

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
        self._broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """File and line or sample."""
        return self.records[index].row

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These documents; in place of one whose image cannot be read, the next one that can.

        Raises:
            DataError: more documents than may be skipped have an image that cannot be read; it names some.
        """
        return [self._document(index) for index in indices]

    def _document(self, index: int) -> Document:
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:
                images = [self._image(record.row, image) for image in record.images]
            except DataError as error:
                self._skip(record.row, error)
                continue
            empty = torch.zeros(0, self.channels, self.image_size, self.image_size)
            return Document(record.text, torch.stack(images) if images else empty, messages=record.messages)
        raise DataError(f"no image of {len(self.records)} documents can be read")

    def _skip(self, row: str, error: DataError) -> None:
        if row in self._broken:
            return
        self._broken[row] = str(error)
        if len(self._broken) > max(1, UNREADABLE_SHARE * len(self.records)):
            examples = "; ".join(list(self._broken.values())[:5])
            raise DataError(
                f"{len(self._broken)} of {len(self.records)} documents have an image that cannot be read, more than "
                f"may be skipped ({UNREADABLE_SHARE:.0%}, or one): {examples}. Remove them."
            ) from error
        log.warning("%s. The document is skipped, the %d. of %d.", error, len(self._broken), len(self.records))

    def _image(self, row: str, stored: StoredImage) -> Tensor:
        return self._transform(decode_image(io.BytesIO(stored.read()), f"{row}: {stored.name}"))


def read_jsonl(path: Path, *, outside: bool = False) -> list[Record]:
    """One document for each line: `{"text": "A cat: <image>", "images": ["cat.png"]}`, files beside the JSONL file.

    Or a conversation: `{"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant",
    "content": "A cat."}], "images": ["cat.png"]}`. Records of OBELICS (`texts` and `images`) and of MMC4 (`text_list`
    and `image_info`) are read too, once their images are files.

    Args:
        path: the JSONL file.
        outside: whether its images may stand outside its folder, as "../cat.png" or "/pictures/cat.png". Documents of
            somebody else could otherwise make any image of the disk a part of the training data. (Links inside the
            folder are followed.)

    Raises:
        DataError: a line that is not of this form, or names an image file that does not exist or stands outside.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is in UTF-16. Save it in UTF-8, as JSONL is.")
    records = []
    # Only a line feed ends a line: texts may hold what Unicode counts as line ends too.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        row = f"{path}, line {number}"
        text, names, messages = _parsed(line, row)
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
        records.append(Record(row, text, tuple(map(StoredImage, names, files)), messages))
    return records


def read_shards(paths: Iterable[Path]) -> list[Record]:
    """The samples of webdataset shards: files of a tar archive that share their name up to the first dot.

    A sample is `key.json`, in a form that `read_jsonl` takes (by default `images` are all images of the sample, in
    order of their names), or `key.txt`, the caption of the one image beside it; img2dataset's `key.json` beside that
    holds no text and is left alone. Hidden members, a README and others of no sample are left out, counted and said.
    Only the headers of an archive are read here: images are read in place, so that documents keep the random access
    that exact resume needs.

    Raises:
        DataError: a file that is not a tar archive or is cut off, or a malformed sample.
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
    length, end, left_out = path.stat().st_size, 0, []
    for member in shard:
        size = member.size if member.isfile() else 0
        end = member.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.issparse() or member.offset_data + size > length:
            raise DataError(f"{path}: {member.name} claims {member.size:,} bytes, more than there are")
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile() and key and extension:
            samples[f"{folder}/{key}".lstrip("/")][extension] = member
        elif member.isfile():
            left_out.append(member.name)
    _check_ends(path, end)
    for key, members in samples.items():
        row = f"{path}, sample {key}"
        pictures = sorted((name for name in members if f".{name}".lower().endswith(EXTENSIONS)), key=_numeric_order)
        content = _content(shard, members["json"], row) if "json" in members else b""
        messages: tuple[Message, ...] = ()
        if content and not ("txt" in members and not _holds_text(content)):
            text, names, messages = _parsed(content, row, default=pictures)
        elif not pictures and key.rpartition("/")[2].lower() in ("readme", "license", "licence"):
            left_out += [member.name for member in members.values()]
            continue
        elif "txt" in members:
            text, names = IMAGE + _decoded(_content(shard, members["txt"], row), row), pictures
        else:
            raise DataError(f"{row}: neither {key}.json nor {key}.txt among {sorted(members)}")
        if missing := [name for name in names if name not in members]:
            raise DataError(f"{row}: the image {missing[0]} is not among {sorted(members)}")
        images = (StoredImage(members[n].name, path, members[n].offset_data, members[n].size) for n in names)
        yield Record(row, text, tuple(images), messages)
    if left_out:
        examples = f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}"
        say_left_out(path, f"{len(left_out)} members that belong to no sample ({examples})")


def _check_ends(path: Path, end: int) -> None:
    """Raise unless an archive is whole: reading one whose tail is missing ends without an error."""
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE or any(mark):
            raise DataError(f"{path} is cut off or damaged after {end:,} bytes: the mark of its end is missing")
        while block := file.read(2**20):
            if any(block):
                raise DataError(f"{path} holds a second archive after its end. Unpack them and pack them into one.")


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, row: str) -> bytes:
    if member.size > _TEXT:
        raise DataError(f"{row}: {member.name} has {member.size:,} bytes, and texts at most {_TEXT:,}")
    file = shard.extractfile(member)
    assert file is not None
    return file.read()


def _decoded(text: bytes, row: str) -> str:
    try:
        return text.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{row}: the text is not UTF-8: {error}") from error


def _holds_text(content: bytes) -> bool:
    """Whether a JSON object is a document, and not img2dataset's record of a download."""
    return any(f'"{key}"'.encode() in content for key in ("text", "texts", "text_list", "messages"))


def _parsed(line: bytes, row: str, default: Sequence[str] = ()) -> tuple[str, Sequence[str], tuple[Message, ...]]:
    """The text, the names of its images, and its messages: of narrows' own form, OBELICS' or MMC4's."""
    decoded = _decoded(line, row)
    try:
        entry: Any = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{row}: not JSON: {error}") from error
    text: Any = None
    names: Any = None
    messages: tuple[Message, ...] = ()
    if isinstance(entry, dict) and isinstance(entry.get("texts"), list):
        text, names = _of_obelics(entry["texts"], entry.get("images"))
    elif isinstance(entry, dict) and isinstance(entry.get("text_list"), list):
        text, names = _of_mmc4(entry["text_list"], entry.get("image_info"))
    elif isinstance(entry, dict):
        text, names = entry.get("text"), entry.get("images", default)
        if "messages" in entry:
            messages = _messages(entry["messages"], row)
            text = text_of(messages)
        names = [] if names is None else [names] if isinstance(names, str) else names
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not isinstance(text, str) or not listed:
        raise DataError(
            f'{row}: expected {{"text": "... {IMAGE} ...", "images": ["file", ...]}}, "messages" and "images", '
            f'"texts" and "images" of one length (OBELICS), or "text_list" and "image_info" (MMC4), got {decoded[:80]}'
        )
    if remote := [name for name in names if re.match(r"https?:", name)]:
        raise DataError(f"{row}: the image {remote[0]} is an address. Download the images and put their files there.")
    return text, names, messages


def _messages(given: Any, row: str) -> tuple[Message, ...]:
    """A conversation as chat templates take it."""
    listed = isinstance(given, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in given
    )
    if not listed or not any(one["role"] == "assistant" for one in given):
        raise DataError(
            f'{row}: expected "messages" as [{{"role": "user", "content": "..."}}, ...] with one of the assistant at '
            f"least, got {str(given)[:80]}"
        )
    return tuple(Message(one["role"], one["content"]) for one in given)


def _of_obelics(texts: list[Any], images: Any) -> tuple[str | None, list[Any] | None]:
    """Lists of one length, in each place a text or an image (Laurencon et al. 2023)."""
    if not isinstance(images, list) or len(images) != len(texts):
        return None, None
    parts = [IMAGE if text is None and image is not None else text for text, image in zip(texts, images, strict=True)]
    kept = [image for text, image in zip(texts, images, strict=True) if text is None and image is not None]
    return ("".join(part or "" for part in parts) if all(isinstance(p, str | None) for p in parts) else None), kept


def _of_mmc4(sentences: list[Any], info: Any) -> tuple[str | None, list[Any] | None]:
    """Sentences, and images each before the sentence that it fits best (Zhu et al. 2023)."""
    if not isinstance(info, list) or not all(isinstance(sentence, str) for sentence in sentences):
        return None, None
    places: dict[int, list[Any]] = defaultdict(list)
    for image in info:
        if not isinstance(image, dict) or image.get("matched_text_index") not in range(len(sentences)):
            return None, None
        places[image["matched_text_index"]].append(image.get("image_name"))
    text = " ".join(IMAGE * len(places[place]) + sentence for place, sentence in enumerate(sentences))
    return text, [name for place in range(len(sentences)) for name in places[place]]


def _numeric_order(name: str) -> list[int | str]:
    """A sort key: 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
