"""Images that several trainings look at, drawn once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from narrows.data import DigitScenes, ImageSet, RememberedImages, load
from narrows.data.images import Augmentation
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


def test_held_out_images_are_not_augmented(folder):
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


class Counted(ImageSet):
    """Digit scenes that know how often they were drawn."""

    def __init__(self) -> None:
        self.scenes, self.drawn = DigitScenes(length=8), 0

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        return self.scenes.batch(indices, epoch)


def test_a_batch_is_drawn_once_and_is_what_the_other_set_draws() -> None:
    counted = Counted()
    remembered = RememberedImages(counted)
    assert len(remembered) == 8
    assert remembered.name(3) == "scene 3"
    asked = [([0, 1], 0), ([1, 0], 0), ([0, 1], 1)]
    for indices, epoch in asked * 2:
        images, labels = remembered.batch(indices, epoch)
        expected = counted.scenes.batch(indices, epoch)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
    assert counted.drawn == len(asked)


def test_batches_beyond_the_capacity_are_drawn_every_time() -> None:
    counted = Counted()
    remembered = RememberedImages(counted, capacity=2 * 32 * 32 * 4)
    for _ in range(2):
        for indices in ([0, 1], [2]):
            assert torch.equal(remembered.batch(indices)[0], counted.scenes.batch(indices)[0])
    assert counted.drawn == 3
