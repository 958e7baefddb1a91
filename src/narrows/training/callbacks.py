"""What `narrows fit` and `narrows predict` leave behind."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from narrows.data import ImageDataModule, Position
from narrows.hub.starting import save_model
from narrows.training.task import Task


class SavePretrained(Callback):
    """Writes the best model as safetensors and config into `<run>/model`.

    It is the last model where nothing says which is best, or where checkpoints are sharded. `load_model` and
    `narrows show` take the folder; timm takes that of a model of its own as "local-dir:<folder>".
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        assert isinstance(pl_module, Task)
        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        # Every process has to ask for these two: they come from all of them.
        folder = trainer.log_dir
        weights = get_model_state_dict(pl_module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero and folder is not None:
            if best.is_file():
                weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            model = pl_module.new_model()
            model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
            save_model(model, Path(folder) / "model")


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
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # comes from all processes as well
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ImageDataModule)
        self.path = folder / "predictions.csv"
        folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "class", "probability"))
            for index, label_of, likely in sorted(row for rows in everyone for row in rows):
                table.writerow((data.to_predict.name(index), data.loaded.classes[label_of], f"{likely:.6f}"))
