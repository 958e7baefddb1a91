"""Folders of images as people have them: which files count, once each, with which class, in which part."""

import logging
import os
import socket
from pathlib import Path

import pytest

from narrows.data import load
from narrows.data.listing import find_images, list_folder, printable, say_once, split, walk
from narrows.errors import DataError, InvalidArgument
from tests.data.folders import write_classes, write_image

ROOT = Path("/data")


def _samples(counts: dict[str, int]) -> list[tuple[Path, int]]:
    return [(ROOT / n / f"{i}.jpg", k) for k, (n, count) in enumerate(counts.items()) for i in range(count)]


def _touch(path: Path) -> Path:
    """A file that is an image by its extension; listing does not open those."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def _tree(root: Path, *paths: str) -> Path:
    for path in paths:
        _touch(root / path)
    return root


CATS_AND_DOGS = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")


def _parts(root: Path, *names: str) -> Path:
    return _tree(root, *(f"{name}/{file}" for name in names for file in CATS_AND_DOGS))


@pytest.mark.parametrize(
    ("training", "held_out", "part"),
    [
        ("train", "val", "validation"),
        ("Training", "Testing", "test"),
        ("Train", "Val", "validation"),
        ("TRAIN", "VALID", "validation"),
        ("train_set", "validation-set", "validation"),
        ("train_images", "test_images", "test"),
        ("trainset", "dev", "validation"),
        ("train2017", "val2017", "validation"),
        ("training data", "evaluation", "test"),
    ],
)
def test_parts_are_known_by_the_names_people_give_them(tmp_path, training, held_out, part):
    listed = list_folder(_parts(tmp_path, training, held_out))
    assert listed.names == {"training": training, part: held_out}
    assert listed.classes == ("cat", "dog")
    assert [label for _, label in listed.training] == [label for _, label in listed.held_out[part]] == [0, 0, 1, 1]
    assert {path.relative_to(tmp_path).parts[0] for path, _ in listed.training} == {training}


def test_a_held_out_folder_beside_the_classes_is_held_out(tmp_path):
    listed = list_folder(_parts(_tree(tmp_path, *CATS_AND_DOGS), "val"))
    assert listed.classes == ("cat", "dog")
    assert (len(listed.training), len(listed.held_out["validation"])) == (4, 4)


def test_a_flat_held_out_folder_has_no_labels_and_is_said(tmp_path):
    listed = list_folder(_tree(_parts(tmp_path, "train"), "test/1.jpg", "test/2.jpg"))
    assert listed.held_out == {}
    assert "2 images in a part without class folders, hence without labels (test/1.jpg, test/2.jpg)" in listed.left_out


@pytest.mark.parametrize("name", ["train", "val", "test", "training"])
def test_a_class_may_be_called_like_a_part(tmp_path, name):
    listed = list_folder(_tree(tmp_path, f"{name}/1.jpg", f"{name}/2.jpg", "car/1.jpg", "car/2.jpg"))
    assert listed.classes == tuple(sorted(("car", name)))
    assert listed.held_out == {}


def test_words_that_begin_like_a_part_are_classes(tmp_path):
    listed = list_folder(
        _tree(tmp_path, "trains/old/1.jpg", "valley/1.jpg", "test_tube/1.jpg", "train station/a/1.jpg")
    )
    assert listed.classes == ("test_tube", "train station", "trains", "valley")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([f"val/{file}" for file in CATS_AND_DOGS], r"holds val/ but no train/\. Expected .*/train/<class>/<image>"),
        (["train/1.jpg", "val/1.jpg"], r"train/, val/ hold images but no class folders\. Expected .*train/<class>"),
        (
            [*(f"train/{file}" for file in CATS_AND_DOGS), "plane/1.jpg"],
            r"holds train/ with class folders, and beside it plane: it cannot be told whether",
        ),
        (
            [f"{part}/{file}" for part in ("train", "Training") for file in CATS_AND_DOGS],
            r"Training and train are both folders of training images\. Rename or remove one",
        ),
        (
            [f"archive/{part}/{file}" for part in ("train", "val") for file in CATS_AND_DOGS],
            r"a single class with images, 'archive'.*Did you mean .*archive, which holds train, val\?",
        ),
    ],
)
def test_what_can_be_read_in_several_ways_is_an_error_that_says_so(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        list_folder(_tree(tmp_path, *files))


def test_what_lies_beside_the_parts_is_left_out_and_said(tmp_path):
    listed = list_folder(_tree(_parts(tmp_path, "train", "val"), "samples/1.jpg", "cover.png", "train/loose.jpg"))
    assert len(listed.training) == 4
    assert "2 images outside of the parts (cover.png, samples/1.jpg)" in listed.left_out
    assert "1 images in no class folder (train/loose.jpg)" in listed.left_out


@pytest.mark.parametrize("name", ["a.jfif", "a.AVIF", "a.gif", "a.JPEG", "a.tif", "a.webp", "IMG.2024.jpg"])
def test_extensions_people_have_are_images(tmp_path, name):
    assert walk(_tree(tmp_path, name)).files == [(name,)]


def test_files_without_an_extension_are_images_if_they_begin_like_one(tmp_path):
    write_image(tmp_path / "x.png").rename(tmp_path / "0001")
    write_image(tmp_path / "x.jpg").rename(tmp_path / "frame.17")
    (tmp_path / "README").write_text("no picture")
    (tmp_path / "a.txt").write_bytes(b"\xff\xd8\xff")
    assert walk(tmp_path).files == [("0001",), ("frame.17",)]


def test_what_systems_and_notebooks_leave_behind_is_left_out(tmp_path):
    left = [".ipynb_checkpoints/1.jpg", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "Thumbs.db", "cat/.DS_Store", "cat/a.csv"]
    tree = walk(_tree(tmp_path, *CATS_AND_DOGS, *left))
    assert ["/".join(names) for names in tree.files] == list(CATS_AND_DOGS)
    described = tree.describe_left_out()
    assert "5 hidden and system files and folders (.ipynb_checkpoints, Thumbs.db, __MACOSX, ...)" in described
    assert "1 files that are no images (cat/a.csv)" in described


def test_runs_of_narrows_are_left_out_and_other_folders_of_that_name_are_not(tmp_path):
    run = "runs/2026-01-31_12-00-00"
    _tree(tmp_path, *CATS_AND_DOGS, f"{run}/overlays/1.png", f"{run}/report.html", "2026-01-31_12-00-00/1.jpg")
    assert list_folder(tmp_path).classes == ("2026-01-31_12-00-00", "cat", "dog")
    assert "1 runs of narrows" in list_folder(tmp_path).left_out


def test_links_show_every_file_once(tmp_path):
    root = _tree(tmp_path / "photos", *CATS_AND_DOGS)
    _touch(tmp_path / "elsewhere" / "owl" / "1.jpg")
    (root / "again").symlink_to(root / "cat")  # sorted before the folder it links to
    (root / "cat" / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "dog" / "copy.jpg").symlink_to(root / "cat" / "1.jpg")
    os.link(root / "cat" / "2.jpg", root / "dog" / "hard.jpg")
    (root / "dog" / "nowhere.jpg").symlink_to("missing.jpg")
    (root / "dog" / "itself.jpg").symlink_to("itself.jpg")
    (root / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    tree = walk(root)
    assert ["/".join(names) for names in tree.files] == [*CATS_AND_DOGS, "owl/1.jpg"]
    assert {reason: len(paths) for reason, paths in tree.left_out.items()} == {
        "links to folders that are listed already": 3,
        "links to files that are listed already": 2,
        "broken links": 2,
    }


def test_the_same_file_is_not_in_two_parts(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "val").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).symlink_to(tmp_path / "train" / name)
    assert list_folder(tmp_path).held_out == {"validation": []}
    with pytest.raises(DataError, match="no readable image among the validation images"):
        load(tmp_path, unreadable_share=1.0)


def test_pipes_and_sockets_are_left_out_without_waiting_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        Path("link.jpg").symlink_to("pipe.jpg")
        assert len(walk(tmp_path).left_out["pipes, sockets and devices"]) == 3
        with pytest.raises(InvalidArgument, match=r"pipe\.jpg, which is neither a file nor a folder"):
            find_images([tmp_path / "pipe.jpg"])


def test_names_that_cannot_be_printed_are_shown_with_escapes_and_keep_their_files(tmp_path):
    names = [b"\xff\xfe", b"new\nline", b"\x1b[31mred", b"US$ $"]
    for name in names:
        for index in range(2):
            write_image(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name, b"%d\xe9.png" % index))))
    data = load(tmp_path, image_size=8)
    assert set(data.classes) == {r"\udcff\udcfe", r"new\nline", r"\x1b[31mred", "US$ $"}
    shown = [images.name(i) for images in (data.train, data.held_out) for i in range(len(images))]
    assert all(name.isprintable() and name.encode() for name in shown)
    assert data.train.batch(range(len(data.train)))[0].shape == (4, 3, 8, 8)
    assert printable("Ä€日") == "Ä€日"


def test_left_out_files_are_said_once(tmp_path, caplog):
    say_once.cache_clear()
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "notes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        first, second = load(tmp_path, image_size=8), load(tmp_path, image_size=8)
    assert first.left_out == second.left_out == "1 files that are no images (notes.txt)"
    assert caplog.text.count("left out 1 files that are no images") == 1


def test_split_holds_out_about_a_fifth_of_each_class_and_loses_nothing():
    samples = _samples({"cat": 1000, "dog": 500})
    train, held_out = split(samples, root=ROOT, classes=["cat", "dog"])
    assert sorted(train + held_out) == sorted(samples)
    for label, count in ((0, 1000), (1, 500)):
        # Three standard deviations of a binomial share.
        assert abs(sum(k == label for _, k in held_out) / count - 0.2) < 3 * (0.16 / count) ** 0.5


def test_split_keeps_every_file_where_it_is_when_others_come_and_go():
    before = set(split(_samples({"cat": 100, "dog": 100}), root=ROOT, classes=["cat", "dog"])[1])
    more = [*_samples({"cat": 300, "dog": 100}), *((ROOT / "eel" / f"{i}.png", 2) for i in range(50))]
    after = set(split(more, root=ROOT, classes=["cat", "dog", "eel"])[1])
    assert before <= after
    assert after - before <= set(more) - set(_samples({"cat": 100, "dog": 100}))


def test_split_does_not_depend_on_where_the_folder_lies():
    moved = [(Path("/elsewhere") / p.relative_to(ROOT), k) for p, k in _samples({"cat": 40, "dog": 40})]
    here = split(_samples({"cat": 40, "dog": 40}), root=ROOT, classes=["cat", "dog"])[1]
    there = split(moved, root=Path("/elsewhere"), classes=["cat", "dog"])[1]
    assert [p.relative_to(ROOT) for p, _ in here] == [p.relative_to("/elsewhere") for p, _ in there]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_split_leaves_every_class_something_to_train_on_and_something_to_hold_out(count):
    for name in "abcdefgh":
        train, held_out = split([(ROOT / name / f"{i}.png", 0) for i in range(count)], root=ROOT, classes=[name])
        assert train
        assert held_out


def test_split_needs_two_images_of_a_class():
    with pytest.raises(DataError, match=r"class 'dog' has 1 readable image\(s\) and needs at least 2.*Add images"):
        split(_samples({"cat": 5, "dog": 1}), root=ROOT, classes=["cat", "dog"])


def test_find_images_takes_files_and_folders_in_a_fixed_order(tmp_path):
    write_classes(tmp_path, {"b": 2, "a": 1}, suffix=".JPG")
    (tmp_path / "notes.txt").write_text("")
    single = write_image(tmp_path / "z.png")
    found = find_images([single, tmp_path / "b", tmp_path / "a"])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["z.png", "b/000.JPG", "b/001.JPG", "a/000.JPG"]


def test_find_images_says_what_is_missing(tmp_path):
    with pytest.raises(
        InvalidArgument, match=r"images: expected image files or folders, got .*nope, which does not exist"
    ):
        find_images([tmp_path / "nope"])
    with pytest.raises(InvalidArgument, match=r"images: expected files ending in \.jpg, .*got none"):
        find_images([tmp_path])
