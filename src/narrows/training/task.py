"""What every task shares: a model, how it is optimised, how it is spread over devices."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from narrows.data.positions import keys


class Task(LightningModule):
    """Base class: trains `model` with AdamW; the learning rate warms up linearly and falls to 0 along a cosine.

    What is drawn at random in a step (dropout, stochastic depth, mixing) is a pure function of (seed, step, process),
    so that a resumed run draws what the unbroken one would have drawn. A subclass implements the steps of Lightning.

    Args:
        model: what is trained.
        learning_rate: the peak learning rate.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        betas: of AdamW. 0.999 averages squared gradients over as many steps as a short run has.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay, self.warmup, self.betas = learning_rate, weight_decay, warmup, betas

    def on_fit_start(self) -> None:
        """Keep the seed of the run: `on_train_batch_start` replaces torch's in every step."""
        self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of this step."""
        seed = int(keys(self._seed, self.global_step, self.global_rank)[0])
        if self.device.type == "cpu":
            # Without a GPU, `torch.manual_seed` keeps every call and its stack, to repeat it once CUDA is initialised.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def configure_model(self) -> None:
        """Shard the parameters (FSDP2) where the strategy brings a device mesh: block by block, then the rest."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        stacks = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "blocks"]
        for block in [block for stack in stacks for block in stack.children()]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate that changes with every step."""
        groups = parameter_groups(self.model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_schedule(optimizer, warmup_steps=max(1, round(self.warmup * steps)), total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not: biases, norms, and what `model.no_weight_decay()` names."""
    exempt: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # pyright: ignore
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2].endswith("bias")
        (kept if parameter.ndim <= 1 or is_bias or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_schedule(optimizer: Optimizer, *, warmup_steps: int, total_steps: int | None = None) -> LambdaLR:
    """The learning rate rises linearly over `warmup_steps`, then stays, or falls along a cosine, 0 at `total_steps`.

    It is a function of the step alone. torch's `SequentialLR` of `LinearLR` and `CosineAnnealingLR` gives the same, but
    restores the length of the run that was saved: a run that goes on for longer would end at the peak learning rate.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if total_steps is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    return LambdaLR(optimizer, factor)
