"""Image classification for Lightning's trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from narrows.data import IGNORED
from narrows.errors import InvalidArgument
from narrows.training.task import Task
from narrows.validation import check_share

Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Mixing:
    """Every image of a batch is mixed with its neighbour, all of them in the same way: mixup or CutMix, at even odds.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) adds the images, λ x_i + (1 - λ) x_(i-1); CutMix (Yun et al. 2019,
    arXiv 1905.04899) puts a rectangle of one over the other, 1 - λ of its area. λ ~ Beta(α, α). The classes are mixed
    as the images are.

    Args:
        mixup: α of mixup.
        cutmix: α of CutMix.
    """

    mixup: float = 0.8
    cutmix: float = 1.0

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha <= 0:
                raise InvalidArgument(name, expected="a positive number", got=alpha)

    def __call__(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, "B"], num_classes: int
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B classes"]]:
        """Mixed images, and the share that each class has of them."""
        kinds = (
            v2.MixUp(alpha=self.mixup, num_classes=num_classes),
            v2.CutMix(alpha=self.cutmix, num_classes=num_classes),
        )
        return v2.RandomChoice(kinds)(images, labels)


class Classification(Task):
    """Trains a classifier with cross-entropy and AdamW; the learning rate warms up and falls along a cosine.

    Logged are `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`, `test/loss`, `test/accuracy`. Images with
    the label -100 count in none of them.

    Args:
        model: maps images to logits.
        num_classes: width of the logits.
        label_smoothing: of the cross-entropy in training.
        mixing: mix the images of every training batch; None leaves them as they are.
        options: those of `Task`: `learning_rate`, `weight_decay`, `warmup`, `betas`, `ema`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int = 10,
        label_smoothing: float = 0.1,
        mixing: Mixing | None = None,
        **options: Any,
    ) -> None:
        check_share(label_smoothing=label_smoothing)
        super().__init__(model, **options)
        self.save_hyperparameters(ignore=["model", "mixing"])
        self.num_classes, self.label_smoothing, self.mixing = num_classes, label_smoothing, mixing
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED) for _ in range(3)
        )

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
