"""Semantic segmentation for Lightning's trainer."""

import copy
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassJaccardIndex

from narrows.data import IGNORED
from narrows.models.segmenter import Segmenter
from narrows.training.task import Task

Batch = Sequence[Tensor]


class Segmentation(Task):
    """Trains a segmenter with the cross-entropy of every pixel and AdamW.

    Logged are `train/loss`, `val/loss`, `val/mean_iou`, `test/loss`, `test/mean_iou`. Mean IoU is the usual one: over
    all pixels of all images, intersection by union of what is predicted and what is true, for each class, background
    among them, and the mean of that. Pixels with the label -100 count in none of them.

    Args:
        model: a registry name with feature maps (`Segmenter` puts its head on them), or a module that maps images to
            logits `[B, classes, H, W]`.
        num_classes: width of the logits.
        image_size: side of the square images the backbone is built for.
        channels: channels of the images.
        dim: width of the segmenter's pyramid and head.
        model_args: further arguments of the backbone, over those of its registry name.
        learning_rate: at its highest.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: str | nn.Module = "sepvit_lite",
        *,
        num_classes: int = 11,
        image_size: int = 64,
        channels: int = 1,
        dim: int = 64,
        model_args: dict[str, Any] | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        backbone_args = {"image_size": image_size, **(model_args or {})}
        arguments = {"num_classes": num_classes, "channels": channels, "dim": dim, "backbone_args": backbone_args}
        super().__init__(
            Segmenter(model, **arguments) if isinstance(model, str) else model,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            betas=betas,
        )
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self._backbone, self._model_args = model if isinstance(model, str) else None, arguments
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_mean_iou, self.test_mean_iou = (
            MulticlassJaccardIndex(num_classes, ignore_index=IGNORED) for _ in range(2)
        )

    def new_model(self) -> nn.Module:
        """A segmenter like the one in training, with weights of its own."""
        if self._backbone is None:
            return copy.deepcopy(self.model)
        return Segmenter(self._backbone, **self._model_args)

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
