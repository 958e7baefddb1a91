"""Images that several trainings look at, drawn once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.data import DigitScenes, ImageSet, RememberedImages


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


def test_what_does_not_fit_is_drawn_every_time() -> None:
    counted = Counted()
    remembered = RememberedImages(counted, capacity=2 * 32 * 32 * 4)
    for _ in range(2):
        for indices in ([0, 1], [2]):
            assert torch.equal(remembered.batch(indices)[0], counted.scenes.batch(indices)[0])
    assert counted.drawn == 3
