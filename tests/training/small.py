"""Small things to train."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from narrows.data import ImageDataModule
from narrows.models import create_model
from narrows.training.classification import Classification

SMALL = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "image_size": 16, "channels": 1}


def small_task(**kwargs: Any) -> Classification:
    """A vision transformer of a few thousand parameters for 16-pixel digit scenes."""
    return Classification(create_model("vit_mini", **SMALL), **kwargs)


def small_data(**kwargs: Any) -> ImageDataModule:
    """16-pixel digit scenes in batches of eight."""
    return ImageDataModule("digits", **{"image_size": 16, "batch_size": 8, **kwargs})


def small_trainer(folder: Path, **kwargs: Any) -> Trainer:
    """Two epochs of three batches on the CPU, without output."""
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    few = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**silent, **few, "devices": 1, **kwargs})
