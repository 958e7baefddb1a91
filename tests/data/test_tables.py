"""Tables of Hugging Face's `datasets` are data as folders are. Nothing is downloaded: they are made here."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from narrows.data import load
from narrows.data.folder import FolderImages, load_unlabelled
from narrows.data.images import IGNORED
from narrows.data.module import ImageDataModule, ObjectDataModule
from narrows.data.object_folder import ObjectImages, list_objects
from narrows.data.tables import data_name, is_table, open_table
from narrows.errors import DataError, InvalidType, MissingExtra
from tests.data.folders import truncate, write_classes, write_image
from tests.data.object_folders import write

datasets = pytest.importorskip("datasets")

NAMES = ("cat", "dog", "emu")


def table(folder: Path, labels: Sequence[int | None], *, first: int = 0, names: Sequence[str] = NAMES) -> Any:
    """A `Dataset` with a random picture for each label."""
    paths = [str(write_image(folder / f"{first + number}.png", seed=first + number)) for number in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": paths, "label": list(labels)}, features=features)


def tables(folder: Path, **splits: Sequence[int | None]) -> Any:
    """A `DatasetDict` of such tables; no picture is there twice."""
    made = {split: table(folder, labels, first=100 * at) for at, (split, labels) in enumerate(splits.items())}
    return datasets.DatasetDict(made)


def names(images: Any) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def test_splits_are_parts_and_columns_are_found_by_their_types(tmp_path: Path) -> None:
    made = tables(tmp_path, train=[0, 1, 1], test=[1, 0], validation=[0])
    made.rename_columns({"image": "pixels", "label": "animal"}).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", image_size=16)
    assert data.classes == ("cat", "dog")
    assert (data.held_out_rule, data.channels, data.image_size) == ("the split validation", 3, 16)
    assert names(data.train) == ["train/0", "train/1", "train/2"]
    assert (names(data.held_out), names(data.test)) == (["validation/0"], ["test/0", "test/1"])
    assert data.test.batch([0, 1])[1].tolist() == [1, 0]
    assert data.name == str(tmp_path / "saved")


def test_a_picture_in_a_table_is_the_picture_in_its_file(tmp_path: Path) -> None:
    """Saved with their bytes, as files on disk, and as files that the table names: the same numbers."""
    root = write_classes(tmp_path / "folder", {"cat": 6, "dog": 5})
    rows = [(path, label) for label, name in enumerate(("cat", "dog")) for path in sorted((root / name).iterdir())]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"image": [str(p) for p, _ in rows], "label": [k for _, k in rows]}, features)
    made.save_to_disk(tmp_path / "saved")
    embedded = datasets.load_from_disk(str(tmp_path / "saved"))
    expected, _ = FolderImages(rows, image_size=16).batch(range(11))
    for source in (made, embedded, tmp_path / "saved"):
        data = load(source, image_size=16)
        found = dict[int, torch.Tensor]()
        # Not augmented: what is held out. Training images are cropped at random.
        for index in range(len(data.held_out)):
            found[int(names(data.held_out)[index].split("/")[1])] = data.held_out[index][0]
        assert all(torch.equal(image, expected[row]) for row, image in found.items())
        assert found
    assert made[0]["image"] is not None, "the table of the caller decodes as before"


def test_a_single_split_is_divided_by_the_number_of_the_row(tmp_path: Path) -> None:
    made = table(tmp_path, [0, 1] * 20)
    data, again = load(made, image_size=16), load(made.select(range(30)), image_size=16)
    assert not set(names(data.train)) & set(names(data.held_out))
    assert len(data.train) + len(data.held_out) == 40
    assert set(names(again.held_out)) <= set(names(data.held_out)), "rows keep their part when others are added"
    assert data.held_out_rule == "20% of the images, chosen by a hash of the number of the row"
    assert {int(label) for label in data.held_out.batch(range(len(data.held_out)))[1]} == {0, 1}


def test_rows_without_a_class_and_other_splits_are_left_out_and_named(tmp_path: Path) -> None:
    made = tables(tmp_path, train=[0, 2, None, 2, 0], test=[-1, -1], unsupervised=[0])
    data = load(made, image_size=16)
    assert data.classes == ("cat", "emu"), "classes are those that there are"
    assert data.left_out == (
        "the split unsupervised; 1 rows of the split train without a class; 2 rows of the split test without a class"
    )
    assert len(data.train) + len(data.held_out) == 4


def test_formats_and_selections_of_the_caller_do_not_matter(tmp_path: Path) -> None:
    made = table(tmp_path, [0, 1] * 6)
    expected = load(made.select(range(4, 12)), image_size=16)
    shown = load(made.with_format("numpy").select(range(4, 12)), image_size=16)
    assert torch.equal(expected.held_out[0][0], shown.held_out[0][0])
    assert load(made.filter(lambda row: row["label"] == 1 or row["label"] == 0), image_size=16).num_classes == 2


def test_a_broken_picture_is_skipped_and_named(tmp_path: Path) -> None:
    paths = [str(write_image(tmp_path / f"{number}.png", seed=number)) for number in range(8)]
    truncate(Path(paths[3]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"image": [*paths, None], "label": [0, 1] * 4 + [0]}, features=features)
    )
    with pytest.raises(DataError, match=r"2 of 9 images cannot be read.*/train/3 \(.*train/8 \(.*holds no picture\)"):
        load(made)
    assert [str(row).rpartition("/")[2] for row in load(made, unreadable_share=0.3).skipped] == ["3", "8"]


def _no_picture(folder: Path) -> Any:
    return table(folder, [0, 1]).remove_columns("image")


def _two_pictures(folder: Path) -> Any:
    made = table(folder, [0, 1])
    depth = made.select_columns(["image"]).rename_column("image", "depth")
    return datasets.concatenate_datasets([made, depth], axis=1)


def _no_classes(folder: Path) -> Any:
    return table(folder, [0, 1]).cast_column("label", datasets.Value("int64"))


def _two_classes(folder: Path) -> Any:
    made = table(folder, [0, 1])
    return made.add_column("fine", [0, 0]).cast_column("fine", datasets.ClassLabel(names=["x"]))


def _unknown_splits(folder: Path) -> Any:
    return tables(folder, first=[0, 1], second=[0, 1])


def _same_splits(folder: Path) -> Any:
    return tables(folder, train=[0, 1], val=[0], dev=[1])


def _one_class(folder: Path) -> Any:
    return table(folder, [1, 1])


def _no_labels(folder: Path) -> Any:
    return table(folder, [None, -1])


def _other_classes(folder: Path) -> Any:
    return tables(folder, train=[0, 1], test=[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_picture, r"no column of pictures, of type Image, but label \(ClassLabel\).*cast_column"),
        (_two_pictures, r"2 columns of pictures: image, depth\. .*remove_columns\(\['depth'\]\)"),
        (_no_classes, r"no column of classes, of type ClassLabel, but image \(Image\), label \(Value\).*class_encode"),
        (_two_classes, r"2 columns of classes: label, fine\."),
        (_unknown_splits, r"has the splits first, second: expected one that is called train"),
        (_same_splits, r"val and dev are both splits of validation images"),
        (_one_class, r"holds the single class 'dog': nothing to tell apart"),
        (_no_labels, r"holds no row with a class"),
        (_other_classes, r"split test, holds classes that the training images do not: emu"),
    ],
)
def test_what_a_table_lacks_is_said_in_a_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = table(tmp_path, [0, 1]).to_iterable_dataset()
    with pytest.raises(InvalidType, match=r"got an object of the class IterableDataset\. .*streaming=True"):
        load(stream)
    with pytest.raises(InvalidType, match=r"data: expected a name, a folder, a Dataset or a DatasetDict, got list"):
        load(["photos"])
    assert not is_table(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:nobody/nothing cannot be loaded: \w+: ") as caught:
        load("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"read 'hf:mnist' .* pip install 'narrows\[datasets\]'"):
        load("hf:mnist")


def test_a_name_may_have_a_configuration_and_no_code_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return tables(tmp_path, train=[0, 1], test=[0, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("hf:someone/pets:small").name == "hf:someone/pets:small"
    load("hf:pets")
    assert asked == [(("someone/pets", "small"), {}), (("pets", None), {})]
    table(tmp_path, [0, 1, 0, 1]).save_to_disk(tmp_path / "saved")
    assert load(f"hf:{tmp_path / 'saved'}").num_classes == 2


def test_predict_takes_every_picture_of_a_table(tmp_path: Path) -> None:
    made = tables(tmp_path, train=[0, None], odd=[1])
    made.remove_columns("label").save_to_disk(tmp_path / "saved")
    single = write_image(tmp_path / "single.png")
    found = load_unlabelled([single, tmp_path / "saved"], image_size=16, channels=1)
    assert [name.removeprefix(str(tmp_path)) for name in names(found)] == [
        "/single.png",
        "/saved/train/0",
        "/saved/train/1",
        "/saved/odd/0",
    ]
    whole = tables(tmp_path, train=[0, 1], test=[0])
    module = ImageDataModule(whole, images=[str(tmp_path / "saved")], image_size=16)
    assert len(module.to_predict) == 3
    assert module.to_predict[0][0].shape == (3, 16, 16)


def test_a_table_from_python_is_called_by_the_fingerprint_of_its_rows(tmp_path: Path) -> None:
    made = table(tmp_path, [0, 1, 0, 1])
    assert data_name(made) == f"<Dataset {made._fingerprint[:8]}>" == load(made).name == data_name(open_table(made))
    assert data_name(made) != data_name(made.select([1, 0, 2, 3]))
    assert data_name(datasets.DatasetDict(train=made)) == f"<DatasetDict {made._fingerprint[:8]}>"
    assert data_name("digits") == "digits"


def test_workers_read_what_this_process_reads(tmp_path: Path) -> None:
    made = tables(tmp_path, train=[0, 1] * 4, test=[0, 1])
    batches = [
        next(iter(ImageDataModule(made, image_size=16, batch_size=4, num_workers=workers).train_dataloader()))
        for workers in (0, 1)
    ]
    assert torch.equal(batches[0][0], batches[1][0])


def objects(folder: Path, count: int, *, called: str = "mask") -> tuple[Any, Path]:
    """A table of pictures and of the masks of their objects, and the folder that holds the same files."""
    files = [f"{number}.png" for number in range(count)]
    root = write(folder, [f"images/{file}" for file in files], [f"masks/{file}" for file in files])
    features = datasets.Features({"image": datasets.Image(), called: datasets.Image()})
    columns = {"image": [str(root / "images" / file) for file in files]}
    columns |= {called: [str(root / "masks" / file) for file in files]}
    return datasets.Dataset.from_dict(columns, features=features), root


@pytest.mark.parametrize("called", ["mask", "annotation", "Label"])
def test_masks_in_a_second_column_are_those_of_a_folder(called: str, tmp_path: Path) -> None:
    made, root = objects(tmp_path / "files", 7, called=called)
    datasets.DatasetDict(train=made.select(range(5)), test=made.select([5, 6])).save_to_disk(tmp_path / "saved")
    found = ObjectDataModule(str(tmp_path / "saved"), image_size=16).loaded
    assert (len(found.train), len(found.test), found.held_out_rule) == (5, 2, "splits of the table")
    clips = [clip for part in list_objects(root).parts.values() for clip in part]
    files = ObjectImages(sorted(clips, key=lambda clip: clip.name)[5:], image_size=16)
    for here, there in zip(found.test.batch([0, 1]), files.batch([0, 1]), strict=True):
        assert torch.equal(here, there)
    assert found.test.batch([0])[1].amax() > 0


def test_of_a_table_of_objects_without_parts_a_fifth_is_held_out_and_it_holds_no_clips(tmp_path: Path) -> None:
    made, _ = objects(tmp_path / "files", 10)
    found = ObjectDataModule(made, image_size=16).loaded
    assert (len(found.train), len(found.held_out)) == (8, 2)
    alone = ObjectDataModule(made.remove_columns("mask"), image_size=16).loaded
    for data, known in ((found, True), (alone, False)):
        assert bool((data.train.batch([0])[1] != IGNORED).any()) == known
    with pytest.raises(DataError, match="holds images and no clips"):
        _ = ObjectDataModule(made, image_size=16, frames=2).loaded


def test_a_mask_in_a_table_of_another_size_than_its_picture_is_named(tmp_path: Path) -> None:
    made, root = objects(tmp_path / "files", 5)
    write_image(root / "masks" / "3.png", size=(9, 9))
    with pytest.raises(DataError, match=r"rows/3: the mask of frame 0 is 9 x 9 pixels, the image"):
        _ = ObjectDataModule(made, image_size=16).loaded
