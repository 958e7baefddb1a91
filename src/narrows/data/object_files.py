"""Images and clips on disk with the masks of their objects, read a frame at a time: files, COCO, YouTube-VIS, MOVi.

A mask holds 0 on the background, a number for each object, the same in all frames of a clip, and `IGNORED` where
nothing is known.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from narrows.data.decoding import decode_image, readable
from narrows.data.images import IGNORED
from narrows.data.tables import Row
from narrows.errors import DataError, MissingExtra

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class FileClip:
    """Frames that are image files, with mask files beside them, or without masks; or both in rows of a table.

    Args:
        name: in messages and tables.
        frames: image files.
        masks: a mask file for each frame (see `decode_mask`); empty without masks.
        ignored: the value of pixels in mask files that do not count.
    """

    name: str
    frames: tuple[Path | Row, ...]
    masks: tuple[Path | Row, ...] = ()
    ignored: int | None = None

    @property
    def has_masks(self) -> bool:
        return bool(self.masks)

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, frame: int) -> Image.Image:
        return decode_image(self.frames[frame], str(self.frames[frame]))

    def mask(self, frame: int) -> Labels:
        return decode_mask(self.masks[frame], str(self.masks[frame]), ignored=self.ignored)


@dataclass(frozen=True)
class CocoClip:
    """Frames whose masks are polygons or run lengths: an image of COCO, or a clip of YouTube-VIS.

    Args:
        name: in messages and tables.
        frames: image files.
        size: `(height, width)` that the masks are meant for.
        objects: for each object, its segmentation in every frame: polygons, run lengths, or None where it is not seen.
        crowd: for each object, whether it is a group: its pixels count for nothing.
    """

    name: str
    frames: tuple[Path, ...]
    size: tuple[int, int]
    objects: tuple[tuple[Any, ...], ...]
    crowd: tuple[bool, ...]
    has_masks: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, frame: int) -> Image.Image:
        return decode_image(self.frames[frame], str(self.frames[frame]))

    def mask(self, frame: int) -> Labels:
        """Pixels of several objects, and of crowds, are `IGNORED`, as in the code of DINOSAUR."""
        labels, covered = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        for number, (segmentations, crowd) in enumerate(zip(self.objects, self.crowd, strict=True), start=1):
            if segmentations[frame] is None:
                continue
            inside = decode_segmentation(segmentations[frame], self.size, self.name)
            labels[inside] = number
            covered += np.where(inside, 2 if crowd else 1, 0)
        labels[covered > 1] = IGNORED
        return labels


@dataclass(frozen=True)
class MoviClip:
    """A clip in a TFRecord file of MOVi, as TensorFlow Datasets writes it: frames and masks as PNG.

    Args:
        name: in messages and tables.
        file: the TFRecord file.
        offset: of the record's first byte.
        length: of the record, in bytes.
    """

    name: str
    file: Path
    offset: int
    length: int
    has_masks: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self._read()["video"])

    def image(self, frame: int) -> Image.Image:
        return decode_image(BytesIO(self._read()["video"][frame]), self.name)

    def mask(self, frame: int) -> Labels:
        return decode_mask(BytesIO(self._read()["segmentations"][frame]), self.name)

    def _read(self) -> Mapping[str, Sequence[bytes]]:
        return _record(self.file, self.offset, self.length, self.name)


Clip = FileClip | CocoClip | MoviClip
"""An image, or a clip of several frames, and which object is where."""


def list_movi(file: Path) -> list[MoviClip]:
    """The clips in a TFRecord file.

    Raises:
        DataError: the file ends in the middle of a record.
    """
    clips, size, begin = list[MoviClip](), file.stat().st_size, 0
    with file.open("rb") as records:
        while begin < size:
            head = records.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            end = begin + 12 + length + 4  # length and data have a checksum each
            if end > size:
                raise DataError(f"{file} ends within record {len(clips)}: it was not copied whole.")
            clips.append(MoviClip(f"{file.name}[{len(clips)}]", file, begin + 12, length))
            records.seek(end)
            begin = end
    return clips


@lru_cache(maxsize=2)
def _record(file: Path, offset: int, length: int, name: str) -> Mapping[str, Sequence[bytes]]:
    try:
        from tfrecord.example_pb2 import Example  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise MissingExtra("tfrecord", extra="objects", purpose="read TFRecord files") from error
    with file.open("rb") as records:
        records.seek(offset)
        data = records.read(length)
    try:
        features = Example.FromString(data).features.feature
        found = {key: tuple(features[key].bytes_list.value) for key in ("video", "segmentations") if key in features}
    except Exception as error:  # protobuf's own error is a private class
        raise DataError(f"{name}: the record cannot be read: {error}") from error
    if not found.get("video") or len(found["video"]) != len(found.get("segmentations", ())):
        counts = {key: len(value) for key, value in found.items()}
        raise DataError(f"{name}: expected as many frames in 'video' as in 'segmentations', got {counts}.")
    return found


def decode_mask(file: Path | Row | BytesIO, name: str, *, ignored: int | None = None) -> Labels:
    """The object of each pixel `[H, W]`, of an image whose values are numbers of objects, or whose colours are objects.

    Grey images of 1, 8, 16 or 32 bits and those with a palette hold numbers, 0 is the background. In a coloured one
    every colour is an object, and black and what is transparent is the background.

    Args:
        ignored: the value of pixels that do not count (255 in VOC).

    Raises:
        DataError: it cannot be read, or holds fractions.
    """
    try:
        with Image.open(readable(file), formats=("PNG", "TIFF", "BMP", "GIF")) as image:
            image.load()
            if image.mode == "LA":
                image = image.convert("RGBA")
            values = np.asarray(image)
            mode = image.mode
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name} is no PNG, TIFF, BMP or GIF: a mask is one of these (JPEG changes numbers)."
        ) from error
    except Exception as error:  # a broken file makes decoders raise anything
        raise DataError(f"{name} cannot be read as a mask: {type(error).__name__}: {error}") from error
    if mode == "F":
        if not np.array_equal(values, np.round(values)):
            raise DataError(f"{name} holds fractions: a mask holds the number of an object in each pixel.")
    elif mode in ("RGB", "RGBA"):
        colours = values[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        values = np.where(values[..., 3] > 0, colours, 0) if mode == "RGBA" else colours
    elif values.ndim != 2:
        raise DataError(f"{name} has the mode {mode}: expected a grey or coloured image, or one with a palette.")
    labels = values.astype(np.int64)
    return labels if ignored is None else np.where(labels == ignored, IGNORED, labels)


def decode_segmentation(segmentation: Any, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    """The pixels inside polygons or run lengths of COCO, `[H, W]`.

    Raises:
        DataError: it is neither, or of another size.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise MissingExtra("pycocotools", extra="objects", purpose="read masks of COCO") from error
    try:
        runs = segmentation
        if isinstance(segmentation, list):
            runs = coco.merge(coco.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            runs = coco.frPyObjects(segmentation, *size)
        inside = coco.decode(runs).astype(bool)
    except Exception as error:  # its C code raises anything
        raise DataError(f"{name}: a segmentation cannot be read: {type(error).__name__}: {error}") from error
    if inside.shape != size:
        raise DataError(f"{name}: a segmentation is for images of {inside.shape}, this one is {size} high and wide.")
    return inside
