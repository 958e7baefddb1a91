"""Image classification for Lightning's trainer."""

import copy
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from narrows.data import IGNORED
from narrows.hub.starting import starting_model
from narrows.models import create_model, list_models
from narrows.training.mixing import Mixing
from narrows.training.task import Task

Batch = Sequence[Tensor]


class Classification(Task):
    """Trains a classifier with cross-entropy and AdamW; the learning rate warms up and falls along a cosine.

    Logged are `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`, `test/loss`, `test/accuracy`. Images with
    the label -100 count in none of them.

    Args:
        model: a registry name (`narrows info` lists them), a folder with a saved model, "timm:<name>", or a module that
            maps images to logits.
        num_classes: width of the logits.
        image_size: side of the square images.
        channels: channels of the images.
        model_args: further arguments of the model, over those of its registry name.
        learning_rate: at its highest.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        betas: of AdamW. 0.999 averages squared gradients over as many steps as a short run has.
        label_smoothing: of the cross-entropy in training.
        mixing: mix the images of every training batch; None leaves them as they are.
    """

    def __init__(
        self,
        model: str | nn.Module = "vit_mini",
        *,
        num_classes: int = 10,
        image_size: int = 32,
        channels: int = 1,
        model_args: dict[str, Any] | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        label_smoothing: float = 0.1,
        mixing: Mixing | None = None,
    ) -> None:
        sizes = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
        arguments = {**sizes, **(model_args or {})}
        super().__init__(
            starting_model(model, **arguments) if isinstance(model, str) else model,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            betas=betas,
        )
        self.save_hyperparameters(ignore=["mixing"] if isinstance(model, str) else ["mixing", "model"])
        self._model_name, self._model_args = model if isinstance(model, str) else None, arguments
        self.num_classes, self.label_smoothing, self.mixing = num_classes, label_smoothing, mixing
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED) for _ in range(3)
        )

    def new_model(self) -> nn.Module:
        """A model like the one in training, with weights of its own."""
        if self._model_name not in list_models():
            return copy.deepcopy(self.model)
        return create_model(self._model_name, **self._model_args)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Logits."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels, self.num_classes)
            labels = targets.argmax(1)  # the class that has the greatest share of the mixed image
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self.train_accuracy.update(logits.detach(), labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out loss and accuracy."""
        self._judge("val", batch, self.val_loss, self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Test loss and accuracy."""
        self._judge("test", batch, self.test_loss, self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, "B classes"]:
        """Probability of each class."""
        return self(batch[0]).softmax(-1)

    def _judge(self, part: str, batch: Batch, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        counts = labels != IGNORED
        loss.update(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), weight=counts)
        accuracy.update(logits, labels)
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{part}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
