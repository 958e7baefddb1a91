"""Image classification for Lightning's trainer."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from narrows.data import IGNORED
from narrows.models import create_model
from narrows.tasks.optimisation import parameter_groups, warmup_cosine

Batch = Sequence[Tensor]


class Classification(LightningModule):
    """Trains a classifier with cross-entropy and AdamW; the learning rate warms up and falls along a cosine.

    Logged are `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`, `test/loss`, `test/accuracy`. Images with
    the label -100 count in none of them.

    Args:
        model: a registry name (`narrows info` lists them), or a module that maps images to logits.
        num_classes: width of the logits.
        image_size: side of the square images.
        channels: channels of the images.
        model_args: further arguments of the model, over those of its registry name.
        learning_rate: at its highest.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        label_smoothing: of the cross-entropy in training.
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
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.label_smoothing = warmup, label_smoothing
        self._model_name = model if isinstance(model, str) else None
        sizes = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
        self._model_args = {**sizes, **(model_args or {})}
        self.model = create_model(model, **self._model_args) if isinstance(model, str) else model
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED) for _ in range(3)
        )

    def new_model(self) -> nn.Module:
        """A model like the one in training, with weights of its own."""
        if self._model_name is None:
            return copy.deepcopy(self.model)
        return create_model(self._model_name, **self._model_args)

    def configure_model(self) -> None:
        """Shard the parameters (FSDP2) where the strategy brings a device mesh: block by block, then the rest."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        stacks = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "blocks"]
        for block in [block for stack in stacks for block in stack.children()]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Logits."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate that changes with every step."""
        # 0.999 averages squared gradients over as many steps as a short run has.
        groups, betas = parameter_groups(self.model, self.weight_decay), (0.9, 0.98)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = warmup_cosine(optimizer, total_steps=steps, warmup=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _judge(self, part: str, batch: Batch, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        counts = labels != IGNORED
        loss.update(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), weight=counts)
        accuracy.update(logits, labels)
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{part}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
