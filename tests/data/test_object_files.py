from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from narrows.data.images import IGNORED
from narrows.data.object_files import CocoClip, FileClip, decode_mask, list_movi
from narrows.errors import DataError
from tests.data.object_folders import MASK, write_movi

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)


def same_segments(found: np.ndarray, expected: np.ndarray) -> bool:
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) and (0, 0) in pairs


def palette_image() -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray((MASK * 20000).astype(np.uint16)),
        Image.fromarray(MASK.astype(np.int32)),
        Image.fromarray(MASK.astype(np.float32)),
        palette_image(),
        Image.fromarray(COLOURS[MASK]),
        Image.fromarray(np.dstack((COLOURS[MASK] + 7, np.where(MASK > 0, 255, 0)[..., None])).astype(np.uint8), "RGBA"),
    ],
    ids=["8 bits", "16 bits", "32 bits", "whole floats", "palette", "colours", "transparent background"],
)
def test_numbers_palettes_and_colours_are_objects(image: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / ("mask.tiff" if image.mode in "IF" else "mask.png")
    image.save(file)
    assert same_segments(decode_mask(file, "mask"), MASK)


def test_an_ignored_value_is_unknown(tmp_path: Path) -> None:
    Image.fromarray(np.where(MASK == 2, 255, MASK).astype(np.uint8)).save(tmp_path / "mask.png")
    assert decode_mask(tmp_path / "mask.png", "mask").max() == 255
    assert np.array_equal(decode_mask(tmp_path / "mask.png", "mask", ignored=255) == IGNORED, MASK == 2)


@pytest.mark.parametrize("ending", ["jpg", "txt", "png"])
def test_what_is_no_mask_is_named(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"mask.{ending}"
    if ending == "jpg":
        Image.fromarray(MASK.astype(np.uint8)).save(file)
    else:
        file.write_bytes(b"\x89PNG\r\n\x1a\n broken" if ending == "png" else b"hello")
    with pytest.raises(DataError, match="mask 7"):
        decode_mask(file, "mask 7")


def test_fractions_are_no_mask(tmp_path: Path) -> None:
    Image.fromarray(MASK.astype(np.float32) / 3).save(tmp_path / "mask.tiff")
    with pytest.raises(DataError, match="fractions"):
        decode_mask(tmp_path / "mask.tiff", "mask")


def runs(mask: np.ndarray) -> dict[str, object]:
    """Run lengths as COCO writes them uncompressed: column by column, beginning with zeros."""
    values = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *edges.tolist(), values.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if values[0] else []) + counts}


def test_overlaps_and_crowds_are_unknown() -> None:
    pytest.importorskip("pycocotools")
    first, second, crowd = (np.zeros((4, 6), bool) for _ in range(3))
    first[:, :3], second[2:, 2:5], crowd[0, 5] = True, True, True
    clip = CocoClip(
        "a",
        (Path("a.png"),),
        (4, 6),
        ((runs(first),), (runs(second),), (runs(crowd),), (None,)),
        (False, False, True, False),
    )
    expected = np.zeros((4, 6), np.int64)
    expected[first], expected[second], expected[first & second], expected[crowd] = 1, 2, IGNORED, IGNORED
    assert np.array_equal(clip.mask(0), expected)


def test_polygons_are_filled() -> None:
    pytest.importorskip("pycocotools")
    square = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]
    clip = CocoClip("a", (Path("a.png"),), (4, 6), (([square],),), (False,))
    expected = np.zeros((4, 6), np.int64)
    expected[1:3, 1:4] = 1
    assert np.array_equal(clip.mask(0), expected)


@pytest.mark.parametrize("segmentation", [{"size": [2, 2], "counts": [1, 3]}, {"counts": "?!"}, ["ab"], 3])
def test_a_segmentation_that_does_not_fit_is_named(segmentation: object) -> None:
    pytest.importorskip("pycocotools")
    clip = CocoClip("image 3", (Path("a.png"),), (4, 6), ((segmentation,),), (False,))
    with pytest.raises(DataError, match="image 3"):
        clip.mask(0)


def test_records_of_movi_hold_frames_and_masks(tmp_path: Path) -> None:
    pytest.importorskip("tfrecord")
    file = write_movi(tmp_path / "movi_a-train.tfrecord-00000-of-00001", clips=3, frames=2)
    clips = list_movi(file)
    assert [len(clip) for clip in clips] == [2, 2, 2]
    assert all(np.array_equal(clip.mask(1), MASK) for clip in clips)
    assert [clip.image(0).getpixel((0, 0))[0] for clip in clips] == [0, 10, 20]  # pyright: ignore


def test_a_record_that_was_cut_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tfrecord")
    file = write_movi(tmp_path / "movi_a-train.tfrecord-00000-of-00001", clips=2, frames=1)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"movi_a-train.*record 1"):
        list_movi(file)


def test_frames_without_masks_say_so() -> None:
    assert not FileClip("a", (Path("a.png"),)).has_masks
