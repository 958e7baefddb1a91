"""Which images a model is judged by, and whether their labels are its classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from narrows.errors import DataError, InvalidArgument, NarrowsError
from narrows.hub.models import LoadedModel
from narrows.jobs.images import load_images
from tests.data.folders import truncate, write_classes, write_image

THEIRS = LoadedModel(
    "timm:some", nn.Identity(), (8, 8), (0.5,) * 3, (0.5,) * 3, 1000, prepare=lambda image: torch.zeros(3, 8, 8)
)
OURS = LoadedModel("folder", nn.Identity(), (16, 16), (0.5,) * 3, (0.5,) * 3, 2)


def test_classes_are_found_by_their_names(tmp_path: Path) -> None:
    write_classes(tmp_path, {"Cat": 3, "dog": 2})
    images = load_images(tmp_path, replace(THEIRS, classes=("bird", "cat", "dog"), num_classes=3), limit=100)
    assert images.labelled
    assert images.batch(range(5))[1].tolist() == [1, 1, 1, 2, 2]
    assert images.names([0, 4]) == ["cat", "dog"]


def test_as_many_classes_count_in_their_order(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 2})
    images = load_images(tmp_path, replace(THEIRS, num_classes=2), limit=100)
    assert images.batch(range(5))[1].tolist() == [0, 0, 0, 1, 1]


def test_classes_of_another_model_give_no_accuracy(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 2})
    images = load_images(tmp_path, THEIRS, limit=100)
    assert not images.labelled
    assert "whose 2 classes cannot be told to be among the model's 1000" in images.rule
    assert images.names([0]) == ["000.png"]


def test_a_renamed_class_is_no_other_label(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 10, "puma": 10})
    theirs = replace(THEIRS, num_classes=2, classes=("cat", "dog"))
    assert not load_images(tmp_path, theirs, limit=100).labelled
    unnamed = replace(theirs, classes=("LABEL_0", "LABEL_1"))
    assert load_images(tmp_path, unnamed, limit=100).labelled
    with pytest.raises(InvalidArgument, match=r"trained on, 2: 'cat', 'dog', got 2: 'cat', 'puma' in .*Rename"):
        load_images(tmp_path, replace(OURS, classes=("cat", "dog")), limit=100)
    assert load_images(tmp_path, replace(OURS, classes=("cat", "puma")), limit=100).labelled


def test_a_validation_folder_is_what_is_looked_at(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    assert len(load_images(tmp_path, replace(THEIRS, num_classes=2), limit=100)) == 2


def test_images_without_classes_are_searched_in_depth(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "deep" / "er" / "b.png")
    images = load_images(tmp_path, THEIRS, limit=100)
    assert (len(images), images.labelled) == (2, False)


def test_models_of_narrows_are_shown_held_out_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    images = load_images(tmp_path, OURS, limit=100)
    assert images.labelled
    assert 2 <= len(images) < 10
    assert "held out" in images.rule


def test_no_more_than_the_limit_evenly_spread(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    images = load_images(tmp_path, replace(THEIRS, num_classes=2), limit=4)
    assert images.chosen == (0, 5, 10, 15)
    assert [labels.tolist() for _, labels in images.batches(3)] == [[0, 0, 1], [1]]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            "nowhere",
            InvalidArgument,
            "data: expected 'digits', 'small_digits' or a folder of images, got 'nowhere', which is no folder",
        ),
        ("digits", InvalidArgument, "data: expected a folder of images, got 'digits', which are grey"),
        ("small_digits", InvalidArgument, "data: expected a folder of images, got 'small_digits', which are grey"),
    ],
)
def test_what_is_no_folder_is_refused(data: str, error: type[NarrowsError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_images(data, THEIRS, limit=1)


def test_folders_without_readable_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InvalidArgument, match=r"data: expected a folder with images \(\.jpg, .*got .*, which has none"):
        load_images(tmp_path, THEIRS, limit=1)
    truncate(write_image(tmp_path / "broken.png"))
    with pytest.raises(DataError, match="none of the images can be read"):
        load_images(tmp_path, THEIRS, limit=1)


def test_a_table_is_looked_at_as_a_folder_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = write_classes(tmp_path / "photos", {"cat": 4, "dog": 6})
    files = sorted(root.rglob("*.png"))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [str(file) for file in files], "label": [int("dog" in file.parts) for file in files]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    theirs = replace(THEIRS, classes=("bird", "dog", "cat"), num_classes=3, prepare=lambda image: as_tensor(image))
    of_folder, of_table = (load_images(data, theirs, limit=7) for data in (root, table))
    assert of_table.labelled
    assert of_table.rule == "every image in the split rows"
    for ours, expected in zip(of_table.batch(range(7)), of_folder.batch(range(7)), strict=True):
        assert torch.equal(ours, expected)
    assert of_table.names([0, 6]) == of_folder.names([0, 6]) == ["cat", "dog"]
    unlabelled = load_images(table.remove_columns("label"), theirs, limit=100)
    assert not unlabelled.labelled
    assert (len(unlabelled), unlabelled.names([3])) == (10, ["3"])
    held_out = load_images(table, OURS, limit=100)
    assert held_out.rule == "held out: 20% of the images, chosen by a hash of the number of the row"
    assert len(held_out) < 10


def as_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((8, 8)).tobytes()), dtype=torch.uint8)
    return pixels.view(8, 8, 3).movedim(2, 0).float()
