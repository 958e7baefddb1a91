"""The small vision transformer of `narrows reduce`: trained on digit scenes once, and kept."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from narrows.data import ImageDataModule
from narrows.hub.models import LoadedModel, accelerator_of, open_model
from narrows.models import create_model
from narrows.training.classification import Classification
from narrows.training.run import quiet_lightning, train

# Small digits in large scenes, and maximum pooling after the last block: a dropped token of the digit costs accuracy. A
# class token has read all tokens before the first block that is reduced, so that any few tokens would do.
DATA = "small_digits"
SIZE = 56
MODEL: dict[str, Any] = {"patch_size": 4, "depth": 4, "global_pool": "max"}  # 196 tokens
EPOCHS = 10
NAME = "scenes_vit"


def cache_folder() -> Path:
    """Where narrows keeps what it trained for itself: `NARROWS_CACHE`, by default `~/.cache/narrows`."""
    return Path(os.environ.get("NARROWS_CACHE") or Path.home() / ".cache" / "narrows")


def open_scenes_vit(epochs: int = EPOCHS, *, device: str = "auto") -> LoadedModel:
    """The vision transformer of digit scenes: kept in `cache_folder()`, and trained where it is not.

    Args:
        epochs: passes over the training scenes; weights of another number are other weights.
        device: where it is trained.
    """
    folder = cache_folder() / f"{NAME}-{SIZE}-pixels-{epochs}-epochs"
    if not (folder / "config.json").is_file():
        _train(folder, epochs, accelerator_of(device))
    return replace(open_model(str(folder)), name="vision transformer of digit scenes")


def _train(folder: Path, epochs: int, accelerator: str) -> None:
    """Train in a temporary folder and move it when it is complete, so that a kept model is never half written."""
    tqdm.write(f"Training a small vision transformer on digit scenes, once; it is kept in {folder}")
    images = ImageDataModule(DATA, image_size=SIZE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work, quiet_lightning():
        torch.manual_seed(0)
        task = Classification(create_model("vit_mini", image_size=SIZE, channels=1, **MODEL), learning_rate=3e-3)
        try:
            run = train(task, NAME, images, Path(work), label="training", epochs=epochs, accelerator=accelerator)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("The model was not finished, nothing is kept.") from None
        run.folder.rename(folder)
    tqdm.write(f"Trained in {run.seconds:.0f} seconds; accuracy {100 * run.accuracy:.1f} % on held-out scenes")
