"""Where a run is, as its checkpoints say it: between two steps, or before or after the validation that follows one.

Lightning restores its own counters, and some states of them wrongly: after a checkpoint at the last batch of an epoch,
the checkpoints of the resumed run are read as those of the epoch before, and steps are trained twice. So what is saved
is one of three states that it restores as they were: between two epochs, inside an epoch, and inside an epoch with a
validation that is still to come.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Place:
    """How far a run is.

    Args:
        epoch: number of the epoch, from 0.
        batches: training batches of it that are done.
        all_batches: those of all epochs.
        steps: optimizer steps.
        validation: whether a validation follows these batches, and whether it is over: "none", "due", "over".
        is_end: whether these are all batches of the epoch.
    """

    epoch: int
    batches: int
    all_batches: int
    steps: int
    validation: Literal["none", "due", "over"] = "none"
    is_end: bool = False


def place(trainer: Trainer, validated: tuple[int, int] | None) -> Place:
    """Where a run is; batches whose gradients wait for those of others are not done.

    Args:
        trainer: of the run.
        validated: epoch and number of its batches after which the last validation took place.
    """
    loop: Any = trainer.fit_loop
    epochs, progress = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    epoch, done, total, steps = (
        epochs.processed,
        progress.current.processed,
        progress.total.processed,
        trainer.global_step,
    )
    if epochs.started == epoch:
        return Place(epoch, 0, total, steps)
    number = trainer.num_training_batches
    waiting = 0 if done == number else done % trainer.accumulate_grad_batches
    batches = done - waiting
    validation = "none"
    if batches and _validation_follows(trainer, epoch, batches, total - waiting):
        validation = "over" if waiting or validated == (epoch, batches) else "due"
    if batches == number and validation != "due":
        return Place(epoch + 1, 0, total, steps)
    return Place(epoch, batches, total - waiting, steps, validation, is_end=batches == number)


def _validation_follows(trainer: Trainer, epoch: int, batches: int, all_batches: int) -> bool:
    every, interval = trainer.check_val_every_n_epoch, getattr(trainer, "val_check_batch", None)
    if not trainer.enable_validation or interval is None or (every is not None and (epoch + 1) % every != 0):
        return False
    if interval == float("inf"):
        return batches == trainer.num_training_batches
    return (all_batches if every is None else batches) % interval == 0


def write(where: Place, loops: Mapping[str, Any]) -> None:
    """Put a place into Lightning's state of its training loop."""

    def count(progress: Any, total: int, current: int, *, started: int = 0) -> None:
        for part, number in (("total", total), ("current", current)):
            for name in progress[part]:
                progress[part][name] = number + (started if name in ("ready", "started") else 0)

    count(loops["epoch_progress"], where.epoch, where.epoch, started=int(where.batches > 0))
    batches, validated = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    count(batches, where.all_batches, where.batches)
    batches["is_last_batch"] = where.is_end
    count(validated, 0, 0)
    validated["is_last_batch"] = False
    if where.validation == "due":  # begun, with nothing done: Lightning goes back into it
        validated["total"].update(ready=1, started=1)
    step = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    count(step, where.steps, step["current"]["completed"])
    # The count that loggers go by is raised after the validation, when a run goes on behind its batch.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = where.steps - int(where.validation != "none")


def begin(trainer: Trainer) -> None:
    """Tell Lightning, before the first step of a resumed run, that an epoch begins, where one does."""
    loop = trainer.fit_loop
    if loop.restarting and loop.epoch_loop.batch_progress.current.ready == 0:
        loop.restarting = False
