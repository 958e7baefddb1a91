import pytest
import torch

from narrows.data import load
from narrows.data.augmentation import Augmentation
from narrows.errors import InvalidArgument
from tests.data.folders import write_classes

STRONG = Augmentation(least_area=0.08, operations=2, magnitude=9, erasing=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"), {"cat": 8, "dog": 8})


def test_training_images_are_a_pure_function_of_seed_epoch_and_index(folder):
    first, again = (load(folder, image_size=24, seed=3, augmentation=STRONG).train for _ in range(2))
    images, _ = first.batch(range(6), epoch=1)
    torch.manual_seed(99)
    assert torch.equal(again.batch(range(6), epoch=1)[0], images)
    assert not torch.equal(again.batch(range(6), epoch=2)[0], images)
    assert not torch.equal(load(folder, image_size=24, seed=4, augmentation=STRONG).train.batch(range(6), 1)[0], images)


def test_images_to_judge_by_are_not_varied(folder):
    plain, strong = load(folder, image_size=24), load(folder, image_size=24, augmentation=STRONG)
    assert torch.equal(plain.held_out.batch([0, 1])[0], strong.held_out.batch([0, 1])[0])


def test_each_part_changes_images_in_its_own_way(folder):
    def images(augmentation: Augmentation) -> torch.Tensor:
        return load(folder, image_size=24, augmentation=augmentation).train.batch(range(12))[0]

    plain = images(Augmentation(least_area=1.0))
    assert torch.equal(plain, images(Augmentation(least_area=1.0, operations=0, erasing=0.0)))
    changed = (images(Augmentation(least_area=1.0, erasing=1.0)) != plain).any(1).float().mean((1, 2))
    assert (changed > 0.01).all()  # noise in a rectangle of 2 to 33 % of the image
    assert (changed < 0.4).all()
    operated = (images(Augmentation(least_area=1.0, operations=2)) != plain).flatten(1).any(1)
    assert operated.float().mean() > 0.5  # one of the fourteen operations changes nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"least_area": 0.0}, r"least_area: expected a share in \(0, 1\], got 0.0"),
        ({"erasing": 1.5}, r"erasing: expected a share in \[0, 1\], got 1.5"),
        ({"operations": -1}, "operations: expected 0 or more, got -1"),
        ({"magnitude": 31}, "magnitude: expected 0 to 30, got 31"),
    ],
)
def test_errors_say_what_is_expected(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        Augmentation(**arguments)


def test_digit_scenes_take_no_augmentation():
    with pytest.raises(InvalidArgument, match="augmentation: expected None for digit scenes"):
        load("digits", augmentation=STRONG)
