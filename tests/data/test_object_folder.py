from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from narrows.data.images import IGNORED, picture
from narrows.data.object_folder import ObjectImages, list_objects, load_object_folder
from narrows.errors import DataError, InvalidArgument
from tests.data.object_folders import MASK, write, write_coco, write_davis, write_movi, write_voc, write_ytvis


def beside(root: Path) -> Path:
    return write(root, [f"{n}.jpg" for n in "abcdef"], [f"{n}_mask.png" for n in "abcdef"])


def twins(root: Path) -> Path:
    files = [f"{part}/{n}" for part in ("train", "val") for n in "abc"]
    return write(root, [f"images/{file}.jpg" for file in files], [f"masks/{file}.png" for file in files])


def twins_inside_parts(root: Path) -> Path:
    files = [(part, n) for part in ("Training", "Test") for n in "abc"]
    return write(root, [f"{part}/Images/{n}.jpg" for part, n in files], [f"{part}/Masks/{n}.png" for part, n in files])


def clevrtex(root: Path) -> Path:
    names = [f"{folder}/CLEVRTEX_full_{folder}{n:03}" for folder in ("000", "001") for n in range(10)]
    maps = [f"{name}{ending}.png" for name in names for ending in ("", "_depth", "_normal")]
    return write(root, maps, [f"{name}_flat.png" for name in names])


def kubric(root: Path) -> Path:
    frames = [(clip, frame) for clip in range(5) for frame in range(2)]
    return write(
        root,
        [f"{clip}/rgba_{frame:05}.png" for clip, frame in frames],
        [f"{clip}/segmentation_{frame:05}.png" for clip, frame in frames],
    )


def movi(root: Path) -> Path:
    pytest.importorskip("tfrecord")
    write_movi(root / "movi_c-train.tfrecord-00000-of-00002", clips=2, frames=3)
    write_movi(root / "movi_c-train.tfrecord-00001-of-00002", clips=1, frames=3)
    write_movi(root / "movi_c-validation.tfrecord-00000-of-00001", clips=1, frames=3)
    return root


def coco(root: Path) -> Path:
    pytest.importorskip("pycocotools")
    return write_coco(root)


def ytvis(root: Path) -> Path:
    pytest.importorskip("pycocotools")
    return write_ytvis(root)


@pytest.mark.parametrize(
    ("make", "training", "validation", "test"),
    [
        (beside, 5, 1, 0),
        (twins, 3, 3, 0),
        (twins_inside_parts, 3, 0, 3),
        (clevrtex, 16, 2, 2),
        (kubric, 8, 2, 0),
        (write_voc, 3, 1, 0),
        (write_davis, 6, 3, 0),
        (coco, 3, 1, 0),
        (ytvis, 4, 2, 0),
    ],
)
def test_layouts_are_known_as_images(
    make: Callable[[Path], Path], training: int, validation: int, test: int, tmp_path: Path
) -> None:
    found = list_objects(make(tmp_path / "data"))
    counts = [len(found.parts.get(part, ())) for part in ("training", "validation", "test")]
    assert counts == [training, validation, test]
    for clip in (clip for part in found.parts.values() for clip in part):
        assert len(clip) == 1
        assert clip.image(0).size == MASK.shape[::-1]
        assert clip.mask(0).shape == MASK.shape
        assert clip.mask(0).max() == (1 if make in (coco, ytvis) else 2) or make in (coco, ytvis)


@pytest.mark.parametrize(
    ("make", "clips", "frames"), [(kubric, 5, 2), (write_davis, 3, 3), (ytvis, 3, 2), (movi, 4, 3)]
)
def test_folders_of_frames_are_clips(make: Callable[[Path], Path], clips: int, frames: int, tmp_path: Path) -> None:
    found = list_objects(make(tmp_path / "data"), clips=True)
    every = [clip for part in found.parts.values() for clip in part]
    assert [len(clip) for clip in every] == [frames] * clips
    if make is not ytvis:
        assert all(np.array_equal(clip.mask(frames - 1), MASK) for clip in every)


def test_the_border_of_voc_is_ignored_and_its_other_images_are_counted(tmp_path: Path) -> None:
    found = list_objects(write_voc(tmp_path))
    assert found.layout == "PASCAL VOC"
    assert "unlabelled" in found.left_out
    assert {clip.ignored for clip in found.parts["training"]} == {255}  # pyright: ignore


def test_an_object_not_seen_in_a_frame_is_in_no_mask(tmp_path: Path) -> None:
    found = list_objects(ytvis(tmp_path), clips=True)
    assert [int((found.parts["training"][0].mask(frame) == 1).sum()) for frame in range(2)] == [16, 0]


def test_an_image_without_annotations_has_no_object(tmp_path: Path) -> None:
    assert list_objects(coco(tmp_path)).parts["training"][1].mask(0).max() == 0


def test_images_alone_have_no_masks(tmp_path: Path) -> None:
    found = list_objects(write(tmp_path, [f"cat/{n}.png" for n in "abcde"]))
    assert not any(clip.has_masks for part in found.parts.values() for clip in part)


def test_an_image_stays_in_its_part_when_others_are_added(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(20)]
    before = {clip.name for clip in list_objects(write(tmp_path, names)).parts["validation"]}
    after = {clip.name for clip in list_objects(write(tmp_path, [f"{n}.png" for n in range(21)])).parts["validation"]}
    assert len(before) == 4
    assert len(before & after) >= 3


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["a.png", "b.png"], ["a_mask.png"], "no mask of b.png"),
        (["1/a.png", "2/b.png"], ["1/a_mask.png"], "1 of 2 have no mask: 2/b.png"),
        (["a.png"], ["a_mask.png", "c_mask.png"], "without an image: c_mask.png"),
        (["images/a.png", "images/a.jpg"], ["masks/a.png"], "one name"),
        ([], [], "holds no images"),
    ],
)
def test_what_does_not_match_is_named(images: list[str], masks: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list_objects(write(tmp_path, images, masks))


def test_parts_without_training_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none to train on"):
        list_objects(write(tmp_path, ["val/a.png", "test/b.png"]))


def test_images_are_no_clips(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clips"):
        list_objects(write_voc(tmp_path), clips=True)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    index = coco(tmp_path) / "annotations" / "instances_train2017.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(DataError, match="instances_train2017"):
        list_objects(tmp_path)


def test_an_index_whose_images_are_elsewhere_is_named(tmp_path: Path) -> None:
    (coco(tmp_path) / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"000000000000\.jpg"):
        list_objects(tmp_path)


@pytest.mark.parametrize("name", ["file.png", "missing"])
def test_what_is_no_folder_is_an_error(name: str, tmp_path: Path) -> None:
    write(tmp_path, ["file.png"])
    with pytest.raises(InvalidArgument, match=name):
        list_objects(tmp_path / name)


def test_images_and_masks_are_cropped_alike(tmp_path: Path) -> None:
    """The object of each pixel is painted into the image, so that one tells the other."""
    root = tmp_path / "data"
    numbers = np.add.outer(np.arange(20) // 5, 4 * (np.arange(31) // 5)).astype(np.uint8)
    for name in "abcde":
        root.mkdir(exist_ok=True)
        Image.fromarray(np.repeat(numbers[..., None] * 8, 3, 2)).save(root / f"{name}.png")
        Image.fromarray(numbers).save(root / f"{name}_mask.png")
    clips = list_objects(root).parts["training"]
    for size, crop, augmented in ((20, 1.0, False), (20, 1.0, True), (16, 0.8, False)):
        images, masks = ObjectImages(clips, image_size=size, crop=crop, augmented=augmented).batch(range(len(clips)))
        assert images.shape == (len(clips), 3, size, size)
        painted = (picture(images)[:, 0] * 255 / 8).round().long()
        assert torch.equal(painted, masks)


def test_mirroring_and_windows_are_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    clips = list_objects(write_davis(tmp_path, frames=5), clips=True).parts["training"]
    images = ObjectImages(clips * 8, image_size=8, frames=2, augmented=True)
    first, again, later = (images.batch(range(len(images)), epoch)[0] for epoch in (0, 0, 1))
    assert first.shape == (16, 2, 3, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    fixed = ObjectImages(clips, image_size=8, frames=2)
    assert torch.equal(fixed.batch([0], 0)[0], fixed.batch([0], 1)[0])


def test_images_without_masks_are_all_ignored(tmp_path: Path) -> None:
    clips = list_objects(write(tmp_path, [f"{n}.png" for n in "abc"])).parts["training"]
    images = ObjectImages(clips, image_size=8)
    assert not images.has_masks
    assert (images.batch([0])[1] == IGNORED).all()


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, [f"{n}.png" for n in "abc"], [f"{n}_mask.png" for n in "abc"])
    for file in root.glob("*_mask.png"):
        Image.new("L", (5, 4)).save(file)
    clips = list_objects(root).parts["training"]
    with pytest.raises(DataError, match=r"5 x 4 pixels, the image 24 x 16"):
        ObjectImages(clips, image_size=8).batch([0])


def test_every_mask_is_compared_with_its_image_before_training(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(12)]
    root = write(tmp_path / "pairs", names, [f"{n}_mask.png" for n in range(12)])
    load_object_folder(root, image_size=8)
    Image.new("L", (5, 4)).save(root / "7_mask.png")
    with pytest.raises(DataError, match=r"7\.png: the mask of frame 0 is 5 x 4 pixels, the image 24 x 16"):
        load_object_folder(root, image_size=8)
    (root / "7_mask.png").write_bytes(b"no mask")
    with pytest.raises(DataError, match=r"7_mask\.png is no PNG"):
        load_object_folder(root, image_size=8)
    coco = write_coco(tmp_path / "coco")
    index = coco / "annotations" / "instances_train2017.json"
    index.write_text(index.read_text().replace('"height": 16', '"height": 15'))
    with pytest.raises(DataError, match="24 x 15"):
        load_object_folder(coco, image_size=8)


def test_a_photograph_that_is_stored_turned_fits_its_mask(tmp_path: Path) -> None:
    root = write(tmp_path, [], [f"{n}_mask.png" for n in range(6)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for number in range(6):
        Image.new("RGB", (16, 24)).save(root / f"{number}.jpg", exif=exif)
    load_object_folder(root, image_size=8)


def test_a_short_clip_is_named(tmp_path: Path) -> None:
    clips = list_objects(write_davis(tmp_path, frames=2), clips=True).parts["training"]
    with pytest.raises(DataError, match="bear has 2 frames, and 3 are asked for"):
        ObjectImages(clips, image_size=8, frames=3).batch([0])


def test_a_broken_image_is_skipped_and_said(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(40)]
    write(tmp_path, names, [f"{n}_mask.png" for n in range(40)])
    (tmp_path / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = load_object_folder(tmp_path, image_size=8)
    assert found.skipped == (tmp_path / "7.png",)
    assert len(found.train) + len(found.held_out) == 39
    images, masks = found.held_out.batch([0])
    assert images.shape == (1, 3, 8, 8)
    assert masks.unique().tolist() == [0, 1, 2]


def test_clips_are_loaded_whole(tmp_path: Path) -> None:
    found = load_object_folder(write_davis(tmp_path), image_size=8, frames=3)
    assert found.train.batch([0, 1])[0].shape == (2, 3, 3, 8, 8)
    assert found.test is found.held_out
