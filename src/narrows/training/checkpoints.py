"""Checkpoints of a run: the best and the last, each written whole; and signals, which end a run with a checkpoint."""

import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from narrows.errors import Diverged, NarrowsError, Terminated
from narrows.files import check_writable, replacing
from narrows.training.resume import Place
from narrows.training.task import Task

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints as narrows writes every file: beside their target, synced, renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write a checkpoint; Lightning does where `path` is no local one.

        Raises:
            CannotWrite: the disk refuses; the checkpoint that was there is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            torch.save(checkpoint, file)


class Checkpoints(ModelCheckpoint):
    """Keeps the best checkpoints, as Lightning's `ModelCheckpoint` does, and `last.ckpt`: two things.

    The last one is written after every epoch and every validation, after every `every_n_train_steps` or
    `train_time_interval` where one is given, when a run is stopped, and at its end, whatever the best one is. The best
    score survives a resume, in another folder too.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder.

        Raises:
            CannotWrite: no checkpoint could be written there.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None and "://" not in str(self.dirpath):
            check_writable(self.dirpath, folder=True)
        self._written: Place | None = None
        self._steps = trainer.global_step
        self.save_last = bool(self.save_last)  # a link to the best one would not be the last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last checkpoint after its number of steps or its time; the best as Lightning does."""
        checked, stepped = self._last_time_checked, trainer.global_step > self._steps
        self._steps = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self._every_n_train_steps > 0 and stepped and trainer.global_step % self._every_n_train_steps == 0
        if due or self._last_time_checked != checked:
            self._write_last(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best checkpoint, if it is, and the last."""
        super().on_validation_end(trainer, pl_module)
        at_end = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # then that of the epoch follows
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not at_end:
            self._write_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best checkpoint, if it is, and the last."""
        super().on_train_epoch_end(trainer, pl_module)
        self._write_last(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint."""
        self._write_last(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last checkpoint, where the state is that of whole steps and every process is here."""
        together = trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt)
        # A loss that is no number has already changed the parameters.
        if self.save_on_exception and together and not isinstance(exception, Diverged) and trainer.state.fn == "fit":
            assert isinstance(pl_module, Task)
            if pl_module.is_between_steps and trainer.global_step > 0:
                with suppress(NarrowsError):  # what went wrong first is what is told
                    self._write_last(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoints of the run that goes on, as far as they are still there."""
        kept = {path: score for path, score in state_dict["best_k_models"].items() if Path(path).exists()}
        self.best_k_models = kept
        if kept:
            best, worst = (min, max) if self.mode == "min" else (max, min)
            self.best_model_path = best(kept, key=kept.__getitem__)
            self.best_model_score = kept[self.best_model_path]
            self.kth_best_model_path = worst(kept, key=kept.__getitem__)
            self.kth_value = kept[self.kth_best_model_path]
        elif Path(state_dict["best_model_path"]).is_file():
            self.best_model_path = state_dict["best_model_path"]
        self.current_score = state_dict["current_score"]

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Nothing: Lightning asks for it only where the best was written."""

    def _write_last(self, trainer: Trainer, task: LightningModule) -> None:
        """Write the last checkpoint, unless it is of this very place."""
        assert isinstance(task, Task)
        if not self.save_last or getattr(trainer, "fast_dev_run", False) or task.place == self._written:
            return
        best = self._last_global_step_saved, self._last_checkpoint_saved  # by these Lightning knows what it has saved
        super()._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved, self._last_checkpoint_saved = best
        self._written = task.place


class StopOnSignal(Callback):
    """Ctrl-C, SIGTERM and SIGHUP end a training after the batch at hand, in every process of it.

    A second Ctrl-C does not wait for the batch.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any process was asked to.

        Raises:
            KeyboardInterrupt: it was, by Ctrl-C.
            Terminated: by another signal.
        """
        self._stop_together(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop if any process was asked to; the validation is done again when the run goes on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_together(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def _stop_together(self, trainer: Trainer) -> None:
        received = self._received
        if trainer.world_size > 1:
            everywhere = torch.tensor(received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
            received = int(everywhere)
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        if received:
            raise Terminated(received)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
