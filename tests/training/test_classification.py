import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from narrows.errors import InvalidArgument
from narrows.training.classification import Classification
from tests.support import assert_close
from tests.training.small import small_data, small_task, small_trainer


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
    assert task.new_model() is not model


def test_an_unknown_model_is_an_error_that_names_the_nearest():
    with pytest.raises(InvalidArgument, match="Did you mean 'vit_mini'"):
        Classification("vit_mni")


def test_a_checkpoint_holds_nothing_but_plain_data(tmp_path):
    trainer = small_trainer(tmp_path, max_epochs=1)
    task = small_task()
    trainer.fit(task, small_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = Classification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
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
