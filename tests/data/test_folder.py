from pathlib import Path

import pytest

from narrows.data.folder import find_images, find_unreadable, split
from narrows.errors import DataError, InvalidArgument
from tests.data.folders import truncate, write_classes, write_image

ROOT = Path("/data")


def _samples(counts: dict[str, int]) -> list[tuple[Path, int]]:
    return [(ROOT / n / f"{i}.jpg", k) for k, (n, count) in enumerate(counts.items()) for i in range(count)]


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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_truncated_images_are_found_named_counted_and_skipped(tmp_path, suffix, caplog):
    paths = [write_image(tmp_path / f"{i}{suffix}", seed=i, size=(64, 64)) for i in range(5)]
    assert find_unreadable(paths) == set()
    truncate(paths[3])
    assert find_unreadable(paths) == {paths[3]}
    assert "1 of 5 images cannot be read and are skipped" in caplog.text
    assert f"3{suffix}" in caplog.text


def test_more_unreadable_images_than_the_share_are_an_error_that_names_some(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png") for i in range(30)]
    paths[4].write_text("no image")
    paths[9].write_bytes(b"")
    assert find_unreadable(paths, allowed_share=0.1) == {paths[4], paths[9]}
    with pytest.raises(
        DataError, match=r"2 of 30 images cannot be read, more than may be skipped \(1%, or one\): .*4\.png"
    ):
        find_unreadable(paths)


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
