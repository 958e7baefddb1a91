"""Small folders in the layouts that images with object masks are published in."""

import json
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

MASK = np.repeat(np.repeat([[0, 1, 1], [0, 2, 0]], 8, 0), 8, 1)
"""Two objects on a background, 16 high and 24 wide."""

POLYGON = [8.0, 0.0, 24.0, 0.0, 24.0, 8.0, 8.0, 8.0]


def picture(value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((*MASK.shape, 3), value, np.uint8))


def mask(size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8))
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)


def write(root: Path, images: Sequence[str], masks: Sequence[str] = ()) -> Path:
    """These images and masks under `root`."""
    for number, name in enumerate(images):
        _save(picture(number), root / name)
    for name in masks:
        _save(mask(), root / name)
    return root


def write_voc(root: Path) -> Path:
    names = [f"2007_{number:06}" for number in range(4)]
    write(
        root,
        [f"JPEGImages/{name}.jpg" for name in (*names, "unlabelled")],
        [f"Segmentation{kind}/{name}.png" for name in names for kind in ("Object", "Class")],
    )
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, inside in (("train", names[:3]), ("val", names[3:]), ("trainval", names)):
        (lists / f"{part}.txt").write_text("\n".join(inside) + "\n")
    return root


def write_davis(root: Path, frames: int = 3) -> Path:
    clips = ("bear", "dogs", "car")
    files = [f"480p/{clip}/{frame:05}" for clip in clips for frame in range(frames)]
    write(root, [f"JPEGImages/{file}.jpg" for file in files], [f"Annotations/{file}.png" for file in files])
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("bear\ndogs\n")
    (lists / "val.txt").write_text("car\n")
    return root


def write_coco(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train2017", 3), ("val2017", 1)):
        names = [f"{number:012}.jpg" for number in range(count)]
        write(root / part, names)
        height, width = MASK.shape
        index = {
            "images": [
                {"id": 7 + i, "file_name": name, "height": height, "width": width} for i, name in enumerate(names)
            ],
            "annotations": [{"image_id": 7, "segmentation": [POLYGON], "iscrowd": 0, "category_id": 1}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(index))
        captions = {"images": index["images"], "annotations": [{"image_id": 7, "caption": "a cat"}]}
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(captions))
    return root


def write_ytvis(root: Path, frames: int = 2) -> Path:
    height, width = MASK.shape
    for part, clips in (("train", ("a1", "b2")), ("valid", ("c3",))):
        files = {clip: [f"{clip}/{frame:05}.jpg" for frame in range(frames)] for clip in clips}
        write(root / part / "JPEGImages", [file for inside in files.values() for file in inside])
        runs = {"size": [height, width], "counts": [0, 16, height * width - 16]}
        index = {
            "videos": [
                {"id": i + 1, "file_names": inside, "height": height, "width": width, "length": frames}
                for i, inside in enumerate(files.values())
            ],
            "annotations": [{"video_id": 1, "segmentations": [runs, *[None] * (frames - 1)], "iscrowd": 0}],
        }
        (root / part / "instances.json").write_text(json.dumps(index))
    return root


def write_movi(file: Path, *, clips: int, frames: int) -> Path:
    """A TFRecord file as TensorFlow Datasets writes it, without checksums, which are not read."""
    from tfrecord.example_pb2 import Example  # pyright: ignore[reportAttributeAccessIssue]

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as records:
        for clip in range(clips):
            example = Example()
            for _ in range(frames):
                for key, image in (("video", picture(10 * clip)), ("segmentations", mask())):
                    png = BytesIO()
                    image.save(png, "PNG")
                    example.features.feature[key].bytes_list.value.append(png.getvalue())
            data = example.SerializeToString()
            records.write(struct.pack("<Q", len(data)) + b"0000" + data + b"0000")
    return file


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
