import builtins
import sys

import pytest
import torch
from PIL import Image

import narrows.data
from narrows.data import Position, load
from narrows.errors import DataError, InvalidArgument, MissingExtra
from tests.data.folders import truncate, write_classes, write_image


def test_digits_need_no_folder():
    data = load()
    assert (data.name, data.image_size, data.channels, data.num_classes) == ("digits", 32, 1, 10)
    assert data.classes[7] == "7"
    assert load("digits", image_size=48).train[0][0].shape == (1, 48, 48)
    assert torch.equal(load(seed=0).held_out[5][0], load(seed=1).held_out[5][0])
    assert not torch.equal(load(seed=0).train[5][0], load(seed=1).train[5][0])


def test_small_digits_are_a_fifth_to_two_sevenths_as_wide_as_the_scene():
    data = load("small_digits")
    assert (data.name, data.image_size, data.channels) == ("small_digits", 64, 1)
    assert data.held_out.digit_size == data.train.digit_size == (64 * 5 / 28, 64 * 2 / 7)
    assert load("small_digits", image_size=56).train.digit_size == (10, 16)
    with pytest.raises(InvalidArgument, match=r"digit_size: expected 8 <= least"):
        load("small_digits", image_size=32)
    with pytest.raises(InvalidArgument, match=r"or a folder, got 'smal_digits'\. Did you mean 'small_digits'?"):
        load("smal_digits")


def test_a_plain_tree_is_split(tmp_path):
    data = load(write_classes(tmp_path, {"cat": 12, "dog": 9}), image_size=16)
    train = {data.train.name(i) for i in range(len(data.train))}
    held_out = {data.held_out.name(i) for i in range(len(data.held_out))}
    assert len(train) + len(held_out) == 21
    assert not train & held_out
    assert data.classes == ("cat", "dog")
    assert data.test is data.held_out
    assert data.held_out_rule.startswith("20% of the images, chosen by a hash")
    images, labels = data.held_out.batch(range(len(data.held_out)))
    assert images.shape == (len(held_out), 3, 16, 16)
    assert [data.classes[k] for k in labels] == [data.held_out.name(i).split("/")[0] for i in range(len(labels))]


@pytest.mark.parametrize(
    ("parts", "held_out", "test"),
    [
        (("val",), "val", "val"),
        (("test",), "test", "test"),
        (("test", "val"), "val", "test"),
        (("valid",), "valid", "valid"),
    ],
)
def test_train_and_held_out_folders_are_used_as_they_are(tmp_path, parts, held_out, test):
    for part in ("train", *parts):
        write_classes(tmp_path / part, {"cat": 3, "dog": 2})
    data = load(tmp_path)
    assert data.held_out_rule == f"the folder {held_out}/"
    assert [images.name(0) for images in (data.train, data.held_out, data.test)] == [
        "train/cat/000.png",
        f"{held_out}/cat/000.png",
        f"{test}/cat/000.png",
    ]
    assert len(data.train) == 5


def test_train_alone_is_split(tmp_path):
    write_classes(tmp_path / "train", {"cat": 10, "dog": 10})
    data = load(tmp_path)
    assert len(data.train) + len(data.held_out) == 20
    assert "inside train/" in data.held_out_rule


def test_a_class_called_train_is_a_class(tmp_path):
    assert load(write_classes(tmp_path, {"car": 4, "train": 4})).classes == ("car", "train")


def test_hidden_and_empty_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4, ".thumbnails": 4})
    (tmp_path / "empty").mkdir()
    assert load(tmp_path).classes == ("cat", "dog")


def test_a_corrupt_image_is_skipped_and_reported(tmp_path):
    write_classes(tmp_path, {"cat": 8, "dog": 8})
    broken = truncate(write_image(tmp_path / "cat" / "broken.png"))
    data = load(tmp_path)
    assert data.skipped == (broken,)
    assert len(data.train) + len(data.held_out) == 16
    truncate(write_image(tmp_path / "dog" / "broken.png"))
    with pytest.raises(DataError, match=r"2 of 18 images cannot be read"):
        load(tmp_path)
    assert len(load(tmp_path, unreadable_share=0.2).skipped) == 2


def test_augmentation_is_a_function_of_seed_epoch_and_index_and_leaves_the_global_stream_alone(tmp_path):
    write_classes(tmp_path, {"cat": 6, "dog": 6})
    train = load(tmp_path, image_size=16, seed=4).train
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = train[Position(2, epoch=1)][0]
    assert torch.equal(torch.rand(3), expected)
    torch.rand(11)
    assert torch.equal(first, train.batch([0, 2], epoch=1)[0][1])
    assert not torch.equal(first, train[Position(2, epoch=2)][0])
    assert not torch.equal(first, load(tmp_path, image_size=16, seed=5).train[Position(2, epoch=1)][0])
    assert torch.equal(
        load(tmp_path, image_size=16).held_out[0][0], load(tmp_path, image_size=16, seed=5).held_out[0][0]
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_three_channels(tmp_path, mode):
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    suffix = ".tiff" if mode == "CMYK" else ".png"
    Image.new(mode, (30, 20), 1 if mode in ("1", "L", "P", "I;16") else 0).save(tmp_path / "cat" / f"odd{suffix}")
    data = load(tmp_path, image_size=16)
    assert data.skipped == ()
    for images in (data.train, data.held_out):
        assert images.batch(range(len(images)))[0].shape[1:] == (3, 16, 16)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (20, 20))
    picture.paste((255, 255, 255), (0, 0, 20, 10))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: light comes to the right
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            picture.save(tmp_path / name / f"{index}.jpg", exif=exif)
    image = load(tmp_path, image_size=20).held_out[0][0].mean(0)
    assert image[:, 15:].mean() > image[:, :5].mean() + 3


def _file(root):
    return write_image(root / "single.png")


def _missing(root):
    return root / "nope"


def _no_folders(root):
    write_image(root / "a.png")
    return root


def _no_images(root):
    (root / "cat").mkdir()
    (root / "dog").mkdir()
    (root / "dog" / "notes.txt").write_text("")
    return root


def _one_class(root):
    return write_classes(root, {"cat": 5})


def _few(root):
    return write_classes(root, {"cat": 5, "dog": 1})


def _strange_held_out(root):
    write_classes(root / "train", {"cat": 3, "dog": 3})
    write_classes(root / "val", {"cat": 3, "eel": 3})
    return root


def _empty_held_out(root):
    write_classes(root / "train", {"cat": 3, "dog": 3})
    (root / "val" / "cat").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (_file, InvalidArgument, r"data: expected 'digits' or a folder .*got the file .*Name the folder that holds"),
        (
            _missing,
            InvalidArgument,
            r"data: expected 'digits' or a folder .*nope', which does not exist. Check the path",
        ),
        (_no_folders, DataError, r"holds no class folders. Expected .*<class>/<image>, at least two classes"),
        (_no_images, DataError, r"no image in any class folder. Expected .*files ending in \.jpg"),
        (_one_class, DataError, r"a single class with images, 'cat': nothing to tell apart. Expected"),
        (_few, DataError, r"class 'dog' has 1 readable image\(s\) and needs at least 2"),
        (_strange_held_out, DataError, r"val holds classes that the training images do not: eel. Rename or remove"),
        (_empty_held_out, DataError, r"no readable image among the validation images. Add some, or remove"),
    ],
)
def test_folders_that_cannot_be_used_say_why(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        load(make(tmp_path))


def test_misspelled_digits_are_recognised():
    with pytest.raises(InvalidArgument, match=r"got 'digit'\. Did you mean 'digits'\?"):
        load("digit")


def test_image_size_must_be_positive(tmp_path):
    with pytest.raises(InvalidArgument, match="image_size: expected a positive integer, got 0"):
        load(tmp_path, image_size=0)
    with pytest.raises(InvalidArgument, match="size: expected at least 16 pixels"):
        load(image_size=0)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name=name)
        return importing(name, *args, **kwargs)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    from narrows.data.scenes import source_digits

    with pytest.raises(
        MissingExtra, match=r"scikit-learn is needed to make digit scenes.*pip install 'narrows\[train\]'"
    ):
        source_digits.__wrapped__("train")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'narrows\.data' has no attribute 'Digits'"):
        narrows.data.Digits  # noqa: B018


def test_without_lightning_the_data_module_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "narrows.data.module", None)
    with pytest.raises(MissingExtra, match=r"needed to train.*pip install 'narrows\[train\]'"):
        narrows.data.ImageDataModule  # noqa: B018
