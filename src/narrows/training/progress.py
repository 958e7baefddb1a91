"""One line of live progress for a whole training run."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm


class RunProgress(Callback):
    """A bar over all steps of a run, with epoch, training loss and the newest held-out accuracy.

    Args:
        label: what is trained, at the left of the bar.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.accuracy: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        steps = int(trainer.estimated_stepping_batches)
        self.bar = tqdm(
            total=steps,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step on."""
        self.bar.update()
        if trainer.global_step % 20 == 0:
            self._tell(f"loss {outputs['loss']:.2f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new held-out accuracy."""
        if not trainer.sanity_checking and "val/accuracy" in trainer.callback_metrics:
            self.accuracy = trainer.callback_metrics["val/accuracy"].item()
            self._tell("")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar behind."""
        self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar where it stopped."""
        if hasattr(self, "bar"):
            self.bar.close()

    def _tell(self, loss: str) -> None:
        held_out = f"held-out {100 * self.accuracy:.1f} %" if self.accuracy is not None else ""
        self.bar.set_postfix_str(", ".join(part for part in (loss, held_out) if part), refresh=False)
