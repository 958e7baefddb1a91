"""Token reduction while a model is trained, judged or asked."""

import json
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from narrows.adapters import reduce_tokens
from narrows.training.task import Task


class ReduceTokens(Callback):
    """Runs the model under a token reduction for as long as the trainer works.

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
        """Give the model back."""
        self.reduction.remove()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how it was reduced."""
        if trainer.is_global_zero and trainer.log_dir is not None:
            path = Path(trainer.log_dir) / "reduction.json"
            path.write_text(json.dumps(self.arguments) + "\n", encoding="utf-8")
