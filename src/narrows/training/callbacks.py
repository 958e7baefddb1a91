"""What training runs leave behind, and how they show their progress."""

import copy
import csv
import json
import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from narrows.adapters import reduce_tokens
from narrows.data import IGNORED, ImageDataModule, Position, picture
from narrows.files import replacing, write_text
from narrows.hub.models import save_model
from narrows.screen import Bar
from narrows.training.task import Task, about_run
from narrows.visualize import save, segmentations
from narrows.visualize.canvas import carrier_colour, to_rgb

SHOWN = 8
"""Images in the picture of a segmentation."""


class SavePretrained(Callback):
    """Writes the best model as safetensors and config into `<run>/model`.

    It is the last model where nothing says which is best, or where checkpoints are sharded. `load_model` and
    `narrows show` take the folder; timm takes that of a model of its own as "local-dir:<folder>".
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        assert isinstance(pl_module, Task)
        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        # Every process has to read these two: log_dir is broadcast, shards of weights are gathered.
        folder = trainer.log_dir
        weights: dict[str, Any] = get_model_state_dict(
            pl_module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if trainer.is_global_zero and folder is not None:
            if best.is_file():
                weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            model = _unsharded_copy(pl_module.model)
            model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
            save_model(
                model, Path(folder) / "model", classes=pl_module.classes, about=about_run(trainer, best=best.is_file())
            )


def _unsharded_copy(model: nn.Module) -> nn.Module:
    """A model that takes whole weights; what is sharded is built anew from the arguments it was made with."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return copy.deepcopy(model)
    arguments: dict[str, Any] = model._hub_mixin_config  # pyright: ignore[reportAssignmentType]
    return type(model)(**{name: value for name, value in arguments.items() if name != "architecture"})


class PredictionTable(BasePredictionWriter):
    """Writes `<run>/predictions.csv`: image, predicted class, its probability."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Tensor],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather what every process predicted and write one table, in the order of the images."""
        positions: list[Position] = [position for batch in batch_indices[0] for position in batch]
        probability, label = torch.cat(list(predictions)).cpu().max(-1)
        mine = [
            (position.index, int(k), float(p))
            for position, k, p in zip(positions, label, probability, strict=True)
            if position.counts
        ]
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is broadcast: every process has to read it
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ImageDataModule)
        assert isinstance(pl_module, Task)
        classes = pl_module.classes or data.loaded.classes
        self.path = folder / "predictions.csv"
        with replacing(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "class", "probability"))
            for index, label_of, likely in sorted(row for rows in everyone for row in rows):
                table.writerow((data.to_predict.name(index), classes[label_of], f"{likely:.6f}"))


class ClassMaps(BasePredictionWriter):
    """Writes `<run>/predictions/<number>_<image>.png` and `<run>/predictions.png`.

    The first are PNGs with a palette, one for each image, whose pixels are the numbers of the classes: image viewers
    show colours, `PIL` and `torchvision` read classes. The second shows the first images, what is predicted, and the
    truth where it is known.
    """

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder, and forget the images of an earlier call."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is broadcast: every process has to read it
        self.path = folder / "predictions"
        self.path.mkdir(parents=True, exist_ok=True)
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ImageDataModule)
        assert isinstance(pl_module, Task)
        self._classes = pl_module.classes or data.loaded.classes

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the maps of a batch, and keep the first images for the picture."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ImageDataModule)
        assert batch_indices is not None
        positions: Sequence[Position] = batch_indices
        images, truth = batch
        colours = _palette(len(self._classes))
        for position, image, classes, true in zip(positions, images, prediction, truth, strict=True):
            if not position.counts:
                continue
            stem = Path(data.to_predict.name(position.index)).stem
            written = Image.fromarray(classes.to(torch.uint8).cpu().numpy(), mode="P")
            written.putpalette(colours)
            with replacing(self.path / f"{position.index:05}_{stem}.png") as unfinished:
                written.save(unfinished)
            if len(self._shown) < SHOWN:
                self._shown.append((picture(image).cpu(), classes.cpu(), true.cpu()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the first images."""
        if not trainer.is_global_zero or not self._shown:
            return
        images, classes, truth = (list(column) for column in zip(*self._shown, strict=True))
        rows = {"prediction": torch.stack(classes)}
        if all(true.shape == classes[0].shape and (true != IGNORED).any() for true in truth):
            rows = {"truth": torch.stack(truth), **rows}
        save(segmentations(images, rows, self._classes), self.path.with_suffix(".png"))


def _palette(classes: int) -> list[int]:
    """Red, green and blue of each class: black for the first, then the colours of the pictures."""
    colours = [to_rgb(carrier_colour(rank)) for rank in range(classes - 1)]
    return np.concatenate([np.zeros(3), *((colour * 255).round() for colour in colours)]).astype(int).tolist()


class ReduceTokens(Callback):
    """Reduces the model's tokens while the trainer fits, validates, tests or predicts.

    Weights are saved as those of the model itself; `<run>/reduction.json` says how it was reduced.

    Args:
        method: as `narrows.reduce_tokens` takes it.
        budget: likewise.
        execution: likewise.
    """

    def __init__(
        self,
        method: str = "ats",
        budget: int | float | list[int | float | None] = 0.5,
        execution: str = "auto",
    ) -> None:
        self.arguments = {"method": method, "budget": budget, "execution": execution}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reduce the model."""
        assert isinstance(pl_module, Task)
        self.reduction = reduce_tokens(pl_module.model, **self.arguments)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the reduction from the model."""
        self.reduction.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the reduction from the model: after an exception nothing is torn down."""
        if hasattr(self, "reduction"):
            self.reduction.remove()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write how the model was reduced."""
        if trainer.is_global_zero and trainer.log_dir is not None:
            write_text(Path(trainer.log_dir) / "reduction.json", json.dumps(self.arguments) + "\n")


class RunProgress(Callback):
    """A bar over all steps of a run, with the training loss and the newest held-out score.

    Validation, test and prediction on their own have a bar over their batches, which does not stay.

    Args:
        label: what is trained, at the left of the bar.
        metric: the logged score that is shown, in percent unless it is a loss.
    """

    def __init__(self, label: str, metric: str = "val/accuracy") -> None:
        self.label, self.metric = label, metric
        self.bar: Bar | None = None
        self._score = ""
        self._before, self._start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption among them."""
        return self._before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, float]:
        """Seconds of training."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Those of the run that goes on."""
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._start = time.perf_counter()
        steps = trainer.estimated_stepping_batches
        if trainer.is_global_zero:
            self.bar = Bar(self.label, int(steps) if isfinite(steps) else None, done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar to where the training is."""
        if self.bar is None:
            return
        self.bar.advance(trainer.global_step - self.bar.done)
        if trainer.global_step % 20 == 0 and outputs is not None:
            self._tell(f"loss {outputs['loss']:.2f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new held-out score."""
        if not trainer.sanity_checking and self.metric in trainer.callback_metrics:
            score = trainer.callback_metrics[self.metric].item()
            self._score = f"held-out loss {score:.3f}" if "loss" in self.metric else f"held-out {100 * score:.1f} %"
            self._tell("")
        if trainer.state.fn != "fit":
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar where it stopped."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches, unless a training goes on."""
        self._evaluate(trainer, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches."""
        self._evaluate(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches."""
        self._evaluate(trainer, trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """One batch more."""
        if trainer.state.fn != "fit" and self.bar is not None:
            self.bar.advance()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_train_end

    def _evaluate(self, trainer: Trainer, batches: Sequence[int | float]) -> None:
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            total = sum(batches)
            doing = {"validate": "validating", "test": "testing"}.get(trainer.state.fn or "", "predicting")
            self.bar = Bar(doing, int(total) if isfinite(total) else None, unit="batches", keep=False)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def _tell(self, loss: str) -> None:
        if self.bar is not None:
            self.bar.tail(", ".join(part for part in (loss, self._score) if part))
