"""Semantic segmentation for Lightning's trainer."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassJaccardIndex

from narrows.data import IGNORED
from narrows.training.task import Task

Batch = Sequence[Tensor]


class Segmentation(Task):
    """Trains a segmenter with the cross-entropy of every pixel and AdamW.

    Logged are `train/loss`, `val/loss`, `val/mean_iou`, `test/loss`, `test/mean_iou`. Mean IoU is the usual one: over
    all pixels of all images, intersection by union of what is predicted and what is true, for each class, background
    among them, and the mean of that. Pixels with the label -100 count in none of them.

    Args:
        model: maps images to logits `[B, classes, H, W]`; `narrows.models.segmenter.Segmenter` makes one of a backbone.
        num_classes: width of the logits.
        options: those of `Task`: `learning_rate`, `weight_decay`, `warmup`, `betas`, `ema`.
    """

    def __init__(self, model: nn.Module, *, num_classes: int = 11, **options: Any) -> None:
        super().__init__(model, **options)
        self.save_hyperparameters(ignore=["model"])
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_mean_iou, self.test_mean_iou = (
            MulticlassJaccardIndex(num_classes, ignore_index=IGNORED) for _ in range(2)
        )

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes H W"]:
        """Logits of every pixel."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of all pixels of a batch."""
        images, classes = batch
        loss = F.cross_entropy(self(images), classes)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out loss and mean IoU."""
        self._judge("val", batch, self.val_loss, self.val_mean_iou)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Test loss and mean IoU."""
        self._judge("test", batch, self.test_loss, self.test_mean_iou)

    def predict_step(self, batch: Batch, batch_idx: int) -> Int[Tensor, "B H W"]:
        """The likeliest class of each pixel."""
        return self(batch[0]).argmax(1)

    def _judge(self, part: str, batch: Batch, loss: MeanMetric, mean_iou: MulticlassJaccardIndex) -> None:
        images, classes = batch
        logits = self(images)
        loss.update(F.cross_entropy(logits, classes, reduction="none"), weight=classes != IGNORED)
        mean_iou.update(logits, classes)
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{part}/mean_iou", mean_iou, on_step=False, on_epoch=True, prog_bar=True)
