"""Resuming is exact: bit for bit, from any batch, over generations of checkpoints."""

import random
import signal

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn

from narrows.data import ImageDataModule
from narrows.errors import CannotWrite, Diverged, InvalidArgument
from narrows.training.checkpoints import Checkpoints, StopOnSignal, WholeFiles
from narrows.training.classification import Classification
from narrows.training.run import quiet_lightning
from tests.training.small import small_trainer

OPTIONS = {"max_epochs": 4, "limit_train_batches": 5, "accumulate_grad_batches": 2}  # 12 steps of 20 batches
CHECKS = [
    {"limit_val_batches": 0},
    {"check_val_every_n_epoch": 2},
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": None, "val_check_interval": 3},
    {"accumulate_grad_batches": 1},
]


class Cut(Checkpoints):
    """Stops after a batch, counted over all epochs, or in the validation that follows it."""

    def __init__(self, folder, at=None, validating=False, **options) -> None:
        super().__init__(folder, **{"monitor": "val/accuracy", "mode": "max", "save_last": True, **options})
        self.at, self.validating, self.save_on_exception = at, validating, True

    def on_train_batch_end(self, trainer, *args) -> None:
        super().on_train_batch_end(trainer, *args)
        self._stop(trainer, validating=False)

    def on_validation_batch_end(self, trainer, *args) -> None:
        self._stop(trainer, validating=True)

    def _stop(self, trainer, *, validating: bool) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if done == self.at and validating == self.validating:
            raise InterruptedError


def _run(folder, cut: Cut, resume=None, *, workers=0, model=None, callbacks=(), ema=None, **options):
    """One generation: from a checkpoint up to a cut, or to the end. Its last checkpoint, or the one it began from."""
    seed_everything(3, verbose=False)
    task = Classification(model or nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10)), ema=ema)
    data = ImageDataModule("digits", image_size=16, batch_size=8, num_workers=workers)
    options = {**OPTIONS, "enable_checkpointing": True, **options}
    trainer = small_trainer(folder, callbacks=[cut, *callbacks], plugins=[WholeFiles()], **options)
    try:
        with quiet_lightning():
            trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    except InterruptedError:
        assert cut.at is not None
    last = folder / "last.ckpt"
    return last if last.exists() else resume


def _read(path):
    return torch.load(path, weights_only=True)


def _score(checkpoint):
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("Cut"))
    return state["best_model_score"]


def _assert_same(found, expected) -> None:
    assert found["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    for found_of, state in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        for index, moments in state["state"].items():
            assert all(torch.equal(found_of["state"][index][name], value) for name, value in moments.items())
    assert found["lr_schedulers"] == expected["lr_schedulers"]
    assert found["ImageDataModule"] == expected["ImageDataModule"]
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
        assert found["loops"]["fit_loop"][name] == expected["loops"]["fit_loop"][name], name
    assert _score(found) == _score(expected)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return _read(_run(folder, Cut(folder)))


def _generations(tmp_path, cuts, **options):
    """A run that is cut at some batches; each generation has a folder of its own."""
    resume = None
    for number, at in enumerate([*cuts, None]):
        validating = at is not None and at < 0
        folder = tmp_path / str(number)
        resume = _run(folder, Cut(folder, None if at is None else abs(at), validating), resume, **options)
    return _read(resume)


@pytest.mark.parametrize(
    "cuts", [(1, 2), (2, 3), (3, 10), (4, 13), (5, 6), (7, 15), (8, 9), (10, 19), (15, 16), (-5, -20)]
)
def test_ten_places_to_cut_and_three_generations_give_the_unbroken_run(tmp_path, unbroken, cuts):
    assert unbroken["global_step"] == 12
    _assert_same(_generations(tmp_path, cuts), unbroken)


def test_so_they_do_where_workers_prepare_the_images(tmp_path, unbroken):
    _assert_same(_generations(tmp_path, (8, 15), workers=1), unbroken)


@pytest.mark.parametrize("options", CHECKS)
def test_so_they_do_however_often_a_run_is_validated(tmp_path, options):
    folder = tmp_path / "unbroken"
    cuts = sorted(random.Random(str(options)).sample(range(2, 20), 3))
    _assert_same(_generations(tmp_path, cuts, **options), _read(_run(folder, Cut(folder), **options)))


def test_the_last_checkpoint_is_the_last_state_whichever_is_the_best(tmp_path):
    class Worse(Classification):
        def validation_step(self, batch, batch_idx) -> None:
            self.log("val/accuracy", 1.0 / (1 + self.global_step))

    steps = []

    class Watched(Cut):
        def on_train_epoch_end(self, trainer, module) -> None:
            super().on_train_epoch_end(trainer, module)
            steps.append(_read(tmp_path / "last.ckpt")["global_step"])

    trainer = small_trainer(tmp_path, callbacks=[Watched(tmp_path)], enable_checkpointing=True)
    trainer.fit(Worse(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))), ImageDataModule("digits", image_size=16))
    assert steps == [3, 6]
    assert [path.name for path in tmp_path.glob("*.ckpt") if path.name != "last.ckpt"] == ["epoch=0-step=3.ckpt"]


def test_the_last_checkpoint_is_written_every_few_steps_where_that_is_asked(tmp_path):
    cut = Cut(tmp_path, at=9, every_n_train_steps=2)
    cut.save_on_exception = False
    assert _read(_run(tmp_path, cut))["global_step"] == 4


def test_the_best_score_survives_a_resume_and_what_is_gone_does_not(tmp_path, unbroken):
    first = _run(tmp_path / "a", Cut(tmp_path / "a", at=10))
    cut = Cut(tmp_path / "b")
    _run(tmp_path / "b", cut, first)
    assert cut.best_model_score == _score(unbroken)
    (best,) = cut.best_k_models
    for path in (tmp_path / "a").glob("epoch*.ckpt"):
        path.unlink()
    cut = Cut(tmp_path / "c")
    _run(tmp_path / "c", cut, first)
    (best,) = cut.best_k_models
    assert best.startswith(str(tmp_path / "c"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_the_batch_at_hand_and_it_goes_on_exactly(tmp_path, unbroken, number):
    class Signal(Cut):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 7:
                signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        _run(tmp_path / "a", Signal(tmp_path / "a"), callbacks=[StopOnSignal()])
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert getattr(stopped.value.__context__, "signum", signal.SIGINT) == number
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning has set to ignore
    assert signal.getsignal(number) == (signal.default_int_handler if number == signal.SIGINT else before)
    last = tmp_path / "a" / "last.ckpt"
    assert _read(last)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 7
    _assert_same(_read(_run(tmp_path / "b", Cut(tmp_path / "b"), last)), unbroken)


class Breaks(nn.Module):
    """Breaks in training: the loss in the eighth batch, or a parameter in the tenth, the last of its epoch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what, self.calls = nn.Linear(256, 10), what, 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == 10 and self.what == "parameters":
            self.linear.weight.data[0, 0] = torch.inf
            return self.linear(images.flatten(1)).nan_to_num(0, 0, 0)
        return self.linear(images.flatten(1)) * (torch.nan if self.calls >= 8 and self.what == "loss" else 1)


@pytest.mark.parametrize("what", ["loss", "parameters"])
def test_a_run_that_diverges_stops_and_leaves_the_last_good_checkpoint(tmp_path, what):
    options = {"accumulate_grad_batches": 1, "num_sanity_val_steps": 0}
    with pytest.raises(Diverged, match=r"after (8|10) steps .* no finite number"):
        _run(tmp_path, Cut(tmp_path), model=Breaks(what), **options)
    kept = _read(tmp_path / "last.ckpt")
    assert kept["global_step"] == 5
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_full_disk_ends_a_run_with_one_line_and_the_checkpoint_of_before(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(checkpoint, file):
        calls.append(file)
        if len(calls) > 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CannotWrite, match=r"last.ckpt cannot be written: No space left on device|epoch=.*No space"):
        _run(tmp_path, Cut(tmp_path))
    assert _read(tmp_path / "last.ckpt")["global_step"] == 3
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_signal_to_one_process_ends_all(tmp_path):
    class Signal(Cut):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_rank == 1 and trainer.fit_loop.epoch_loop.batch_progress.total.ready == 3:
                signal.raise_signal(signal.SIGTERM)

    options = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": 1}
    # Torch tells of the process that ended first: the one with the signal, or the other.
    with pytest.raises(Exception, match=r"Process [01] terminated [\s\S]*narrows.errors.Terminated"):
        _run(tmp_path, Signal(tmp_path), callbacks=[StopOnSignal()], **options)


class Weights(Callback):
    """Notes the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, task, *_) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append(task.model[2].weight.detach().clone())


class Early(Callback):
    """Stops after a batch, before the weights of its step are averaged."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.at:
            raise InterruptedError


def test_averaged_weights_are_validated_saved_and_resumed_exactly(tmp_path):
    weights, few = Weights(), {"ema": 0.8, "max_epochs": 2, "accumulate_grad_batches": 1}
    unbroken = _read(_run(tmp_path / "unbroken", Cut(tmp_path / "unbroken"), callbacks=[weights], **few))
    average = weights.seen[0]
    for seen in weights.seen[1:]:
        average = 0.8 * average + 0.2 * seen
    assert len(weights.seen) == 10
    torch.testing.assert_close(unbroken["state_dict"]["model.2.weight"], average)
    assert torch.equal(unbroken["current_model_state"]["model.2.weight"], weights.seen[-1])
    in_validation = _generations(tmp_path / "validation", (3, -5), **few)
    before_averaging = _run(tmp_path / "early", Cut(tmp_path / "early", at=99), callbacks=[Early(4)], **few)
    assert _read(before_averaging)["averaging_state"]["n_averaged"] == 4
    goes_on = _read(_run(tmp_path / "on", Cut(tmp_path / "on"), before_averaging, **few))
    for found in (in_validation, goes_on):
        _assert_same(found, unbroken)
        for name, value in unbroken["current_model_state"].items():
            assert torch.equal(found["current_model_state"][name], value), name
        assert found["averaging_state"] == unbroken["averaging_state"]


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(ema):
    with pytest.raises(InvalidArgument, match="ema: expected None or a decay between 0 and 1"):
        Classification(nn.Linear(2, 2), ema=ema)
