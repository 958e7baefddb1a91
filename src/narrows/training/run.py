"""One training run, and the record of it."""

import logging
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from narrows.data import ImageDataModule
from narrows.errors import Terminated
from narrows.hub.models import save_model
from narrows.training.callbacks import RunProgress
from narrows.training.checkpoints import Checkpoints, StopOnSignal, WholeFiles
from narrows.training.classification import Classification
from narrows.training.task import data_of

LAST = "last.ckpt"


@dataclass(frozen=True)
class Run:
    """One model trained from one seed.

    Args:
        model: its name.
        seed: of weights, order and augmentation.
        accuracy: share of the held-out images it gets right.
        images: training images it saw.
        seconds: wall time of the training.
        folder: where it is saved; `narrows.load_model` takes it, or "timm:local-dir:<folder>" names it if it is timm's.
    """

    model: str
    seed: int
    accuracy: float
    images: int
    seconds: float
    folder: Path


def train(
    task: Classification,
    name: str,
    images: ImageDataModule,
    folder: Path,
    *,
    label: str,
    epochs: int,
    device: str | torch.device,
) -> Run:
    """Train one model, judge it on the held-out images and save it to `folder/models/<name>-seed<seed>`.

    It goes on where an earlier call with this folder was stopped.

    Args:
        task: holds the model.
        name: of the model.
        images: to train and to judge.
        folder: where the model and its logs go.
        label: left of the bar.
        epochs: passes over the training images.
        device: where.

    Raises:
        Diverged: the loss or the weights are no numbers any more; nothing is saved.
    """
    run_name = name_of(name, images.seed)
    trainer = progress_trainer(
        folder / "logs" / run_name,
        label=label,
        max_epochs=epochs,
        device=device,
        check_val_every_n_epoch=max(1, epochs // 4),
    )
    fit(trainer, task, images)
    (progress,) = (callback for callback in trainer.callbacks if isinstance(callback, RunProgress))  # pyright: ignore[reportAttributeAccessIssue]
    seconds = progress.seconds
    accuracy = trainer.validate(task, datamodule=images, verbose=False)[0]["val/accuracy"]
    about = {
        **data_of(images.loaded),
        "Training": f"{trainer.global_step:,} steps of {images.batch_size} images, seed {images.seed}",
        "Held-out accuracy": f"{100 * accuracy:.1f} %",
    }
    save_model(task.model, folder / "models" / run_name, classes=task.classes, about=about)
    images_seen = trainer.global_step * images.batch_size
    return Run(name, images.seed, accuracy, images_seen, seconds, folder / "models" / run_name)


def name_of(model: str, seed: int) -> str:
    """What the folders of a run are called.

    >>> name_of("timm:vit_small_patch16_224", 0)
    'timm-vit_small_patch16_224-seed0'
    """
    plain = re.sub(r"[^\w.-]+", "-", model)
    return f"{plain}-seed{seed}"


def trainer_device(device: torch.device) -> dict[str, Any]:
    """The arguments by which a trainer runs on one device.

    >>> trainer_device(torch.device("cuda:1"))
    {'accelerator': 'cuda', 'devices': [1]}
    """
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


def progress_trainer(
    logs: Path, *, label: str, device: str | torch.device, metric: str = "val/accuracy", **options: Any
) -> Trainer:
    """A trainer on one device that shows one bar with `label` and a held-out `metric`, and logs to CSV in `logs`.

    There is also `last.ckpt`, for the caller to remove when its result is kept: with it `fit` goes on where it was
    stopped.
    """
    last = Checkpoints(logs, save_top_k=0, save_last=True, save_on_exception=True, enable_version_counter=False)
    return Trainer(
        **trainer_device(torch.device(device)),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[RunProgress(label, metric), StopOnSignal(), last],
        plugins=[WholeFiles()],
        logger=CSVLogger(logs.parent, name=logs.name, version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule) -> None:
    """`trainer.fit`, from the checkpoint that an earlier call left when it was stopped.

    Ctrl-C is a `KeyboardInterrupt`: Lightning turns it into an exit and goes on ignoring it; both are for the caller to
    decide.
    """
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, Checkpoints)
    assert checkpoints.dirpath is not None
    last = Path(checkpoints.dirpath) / LAST
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise Terminated(getattr(stop.__context__, "signum", signal.SIGINT)) from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's notes on devices and workers, which would break the progress bar."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            logger.setLevel(level)
