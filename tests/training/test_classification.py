import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from narrows.errors import InvalidArgument
from narrows.training.classification import Classification, Mixing
from tests.support import assert_close
from tests.training.small import small_data, small_task, small_trainer

# Image i is all i, so that a mixed pixel tells of which images it is made.
IMAGES = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous()
LABELS = torch.tensor([0, 1, 2, 0])


def _one(images: torch.Tensor, labels: torch.Tensor, times: int = 1) -> DataLoader:
    """A loader of the same batch over and over."""
    return DataLoader([(images, labels)] * times, batch_size=None)


def test_training_learns_what_it_sees(tmp_path):
    task, data = small_task(learning_rate=1e-2, label_smoothing=0.0), small_data(batch_size=32)
    images, labels = data.loaded.train.batch(range(32))
    batches = _one(images, labels, times=150)
    small_trainer(tmp_path, max_epochs=1, limit_train_batches=150, enable_checkpointing=False).fit(task, batches)
    assert F.cross_entropy(task(images), labels) < 0.5


def test_logged_loss_and_accuracy_are_those_of_all_held_out_images(tmp_path):
    task, data = small_task(), small_data(batch_size=64)
    (logged,) = small_trainer(tmp_path, limit_val_batches=1.0).validate(task, data, verbose=False)
    images, labels = data.loaded.held_out.batch(range(len(data.loaded.held_out)))
    with torch.no_grad():
        logits = task.eval()(images)
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_images_that_do_not_count_change_neither_loss_nor_accuracy(tmp_path):
    task = small_task()
    images, labels = small_data().loaded.held_out.batch(range(8))
    filled = torch.cat((labels[:5], torch.full((3,), -100)))
    trainer = small_trainer(tmp_path, limit_val_batches=1.0)
    (counted,) = trainer.validate(task, _one(images[:5], labels[:5]), verbose=False)
    (ignored,) = trainer.validate(task, _one(images, filled), verbose=False)
    assert ignored == pytest.approx(counted)


def test_predictions_are_probabilities(tmp_path):
    task, data = small_task(), small_data()
    first, *_ = small_trainer(tmp_path, limit_predict_batches=2).predict(task, data)
    with torch.no_grad():
        expected = task.eval()(data.loaded.held_out.batch(range(8))[0]).softmax(-1)
    assert_close(first, expected)


def test_a_module_can_be_trained_as_it_is(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    task = Classification(model)
    before = model[1].weight.detach().clone()
    small_trainer(tmp_path, enable_checkpointing=False).fit(task, small_data())
    assert task.model is model
    assert not torch.equal(model[1].weight, before)


def test_a_checkpoint_holds_nothing_but_plain_data(tmp_path):
    trainer = small_trainer(tmp_path, max_epochs=1)
    task = small_task()
    trainer.fit(task, small_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = Classification.load_from_checkpoint(tmp_path / "a.ckpt", model=small_task().model, weights_only=True)
    for name, value in task.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


class _Stop(Callback):
    """Ends the run as a crash would, after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def _keep_every_step(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def _state(task: Classification) -> dict[str, torch.Tensor]:
    optimizer = task.optimizers(use_pl_optimizer=False)
    moments = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {**task.model.state_dict(), **moments, "rate": torch.tensor(optimizer.param_groups[0]["lr"])}


@pytest.mark.parametrize("cut", [2, 3, 4], ids=["within an epoch", "at the end of an epoch", "within the next epoch"])
def test_resuming_gives_bit_for_bit_what_an_unbroken_run_gives(tmp_path, cut):
    torch.manual_seed(0)
    unbroken = small_task()
    small_trainer(tmp_path, enable_checkpointing=False).fit(unbroken, small_data(seed=3))

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="crash"):
        small_trainer(tmp_path, callbacks=[_keep_every_step(tmp_path), _Stop(cut + 1)]).fit(
            small_task(), small_data(seed=3)
        )
    torch.manual_seed(99)
    resumed = small_task()
    small_trainer(tmp_path, enable_checkpointing=False).fit(
        resumed, small_data(seed=3), ckpt_path=tmp_path / f"step={cut}.ckpt", weights_only=True
    )
    expected = _state(unbroken)
    for name, value in _state(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_give_what_one_gives(tmp_path):
    torch.manual_seed(0)
    alone = small_task()
    start = copy.deepcopy(alone.state_dict())
    # In float64: Adam turns the gradients that are 0 but for rounding (of the keys' bias) into steps of full length.
    few = {"max_epochs": 1, "limit_train_batches": 5, "enable_checkpointing": False, "precision": "64-true"}
    trainer = small_trainer(tmp_path / "1", **few)
    trainer.fit(alone, small_data(batch_size=8))
    (logged_alone,) = trainer.validate(alone, small_data(batch_size=8), verbose=False)

    together = small_task()
    together.load_state_dict(start)
    trainer = small_trainer(tmp_path / "2", devices=2, strategy="ddp_fork", **few)
    trainer.fit(together, small_data(batch_size=4))
    for name, value in alone.model.state_dict().items():
        assert_close(together.model.state_dict()[name], value, 1e-7)
    assert trainer.world_size == 2
    (logged,) = trainer.validate(together, small_data(batch_size=4), verbose=False)
    assert logged == pytest.approx(logged_alone, rel=1e-5)


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
def test_mixing_without_a_distribution_is_refused(name):
    with pytest.raises(InvalidArgument, match=f"{name}: expected a positive number, got 0.0"):
        Mixing(**{name: 0.0})
