import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.training.classification import Classification
from narrows.training.mixing import Mixing
from tests.support import assert_close

# Image i is all i, so that a mixed pixel tells of which images it is made.
IMAGES = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous()
LABELS = torch.tensor([0, 1, 2, 0])


def _mixed() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [Mixing()(IMAGES, LABELS, 3) for _ in range(40)]


def test_classes_are_mixed_as_images_are():
    for images, targets in _mixed():
        assert images.shape == IMAGES.shape
        own = (images.mean((1, 2, 3)) - IMAGES.roll(1, 0)[:, 0, 0, 0]) / (IMAGES - IMAGES.roll(1, 0))[:, 0, 0, 0]
        expected = own[:, None] * F.one_hot(LABELS, 3) + (1 - own[:, None]) * F.one_hot(LABELS.roll(1), 3)
        assert_close(targets, expected)
        assert (own - own[0]).abs().max() < 1e-5


def test_a_coin_says_whether_images_are_added_or_cut():
    added = sum(images[1].unique().numel() == 1 and images[1, 0, 0, 0] % 1 != 0 for images, _ in _mixed())
    cut = sum(images[1].unique().numel() == 2 for images, _ in _mixed())
    assert 8 < added < 32
    assert 8 < cut < 32


def test_the_images_given_stay_as_they_are():
    before = IMAGES.clone()
    _mixed()
    assert torch.equal(IMAGES, before)


def test_a_classifier_trains_on_the_mixed_images_and_classes(monkeypatch):
    images, targets = torch.randn(4, 1, 16, 16), torch.rand(4, 10).softmax(-1)
    monkeypatch.setattr(Mixing, "__call__", lambda self, *given: (images, targets))
    task = Classification(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), label_smoothing=0.1, mixing=Mixing())
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    loss = task.training_step((IMAGES, LABELS), 0)
    smooth = 0.9 * targets + 0.01
    assert_close(loss, -(smooth * task(images).log_softmax(-1)).sum(-1).mean())
    assert task.train_accuracy.compute() == (task(images).argmax(1) == targets.argmax(1)).float().mean()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_errors_say_what_is_expected(name):
    with pytest.raises(InvalidArgument, match=f"{name}: expected a positive number, got 0.0"):
        Mixing(**{name: 0.0})
