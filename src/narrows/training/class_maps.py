"""What `narrows predict` leaves behind of a segmentation: maps of classes, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from narrows.data import IGNORED, ImageDataModule, Position, picture
from narrows.visualize import save, segmentations
from narrows.visualize.canvas import carrier_colour, to_rgb

SHOWN = 8


class ClassMaps(BasePredictionWriter):
    """Writes `<run>/predictions/<number>_<image>.png` and `<run>/predictions.png`.

    The first are PNGs with a palette, one for each image, whose pixels are the numbers of the classes: image viewers
    show colours, `PIL` and `torchvision` read classes. The second shows the first images, what is predicted, and the
    truth where it is known.
    """

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder; the picture begins anew."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process has to ask
        self.path = folder / "predictions"
        self.path.mkdir(parents=True, exist_ok=True)
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []

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
        """Write the maps of a batch, and remember the first images."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ImageDataModule)
        assert batch_indices is not None
        positions: Sequence[Position] = batch_indices
        images, truth = batch
        colours = _palette(len(data.loaded.classes))
        for position, image, classes, true in zip(positions, images, prediction, truth, strict=True):
            if not position.counts:
                continue
            stem = Path(data.to_predict.name(position.index)).stem
            written = Image.fromarray(classes.to(torch.uint8).cpu().numpy(), mode="P")
            written.putpalette(colours)
            written.save(self.path / f"{position.index:05}_{stem}.png")
            if len(self._shown) < SHOWN:
                self._shown.append((picture(image).cpu(), classes.cpu(), true.cpu()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the first images."""
        if not trainer.is_global_zero or not self._shown:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        images, classes, truth = (list(column) for column in zip(*self._shown, strict=True))
        rows = {"prediction": torch.stack(classes)}
        if all(true.shape == classes[0].shape and (true != IGNORED).any() for true in truth):
            rows = {"truth": torch.stack(truth), **rows}
        save(segmentations(images, rows, data.loaded.classes), self.path.with_suffix(".png"))


def _palette(classes: int) -> list[int]:
    """Red, green and blue of each class: black for the first, then the colours of the pictures."""
    colours = [to_rgb(carrier_colour(rank)) for rank in range(classes - 1)]
    return np.concatenate([np.zeros(3), *((colour * 255).round() for colour in colours)]).astype(int).tolist()
