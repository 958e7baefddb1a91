"""The small vision transformer of `narrows reduce`: trained on digit scenes once, and kept."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from narrows.data import ImageDataModule
from narrows.demo.cache import kept
from narrows.errors import Terminated
from narrows.hub.models import LoadedModel, open_model
from narrows.models import create_model
from narrows.screen import say
from narrows.training.classification import Classification
from narrows.training.run import quiet_lightning, train
from narrows.validation import check_device

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


def open_scenes_vit(
    epochs: int = EPOCHS, *, device: str = "auto", check: Callable[[LoadedModel], object] = bool
) -> LoadedModel:
    """The vision transformer of digit scenes: kept in `cache_folder()`, and trained where it is not.

    Args:
        epochs: passes over the training scenes; weights of another number are other weights.
        device: where it is trained.
        check: called with the model before it is trained, to raise where it will not do.
    """
    folder = cache_folder() / f"{NAME}-{SIZE}-pixels-{epochs}-epochs"
    place = check_device(device)
    model = kept(folder, lambda: _train(folder, epochs, place, check), lambda: open_model(str(folder)))
    return replace(model, name="vision transformer of digit scenes")


def _train(folder: Path, epochs: int, device: torch.device, check: Callable[[LoadedModel], object]) -> None:
    """Train in a folder beside, where an interrupted training goes on, and move the model when it is complete."""
    check(open_model("vit_mini", image_size=SIZE, channels=1, **MODEL))
    say(f"Training a small vision transformer on digit scenes, once; it is kept in {folder}")
    images = ImageDataModule(DATA, image_size=SIZE)
    work = folder.with_name(f"{folder.name}.training")
    with quiet_lightning():
        torch.manual_seed(0)
        task = Classification(create_model("vit_mini", image_size=SIZE, channels=1, **MODEL), learning_rate=3e-3)
        try:
            run = train(task, NAME, images, work, label="training", epochs=epochs, device=device)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signum", signal.SIGINT)
            raise Terminated(number, "The model is not finished; the same command goes on with it.") from None
        run.folder.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    say(f"Trained in {run.seconds:.0f} seconds; accuracy {100 * run.accuracy:.1f} % on held-out scenes")
