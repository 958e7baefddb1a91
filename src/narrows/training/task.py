"""What every task shares: a model, how it is optimised, how it is spread over devices."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.fsdp import fully_shard

from narrows.data.positions import keys
from narrows.training.optimisation import parameter_groups, warmup_cosine


class Task(LightningModule):
    """Base class: trains `model` with AdamW; the learning rate warms up and falls along a cosine.

    What is drawn at random in a step (dropout, stochastic depth, mixing) is a pure function of (seed, step, process),
    so that a resumed run draws what the unbroken one would have drawn. A subclass implements `new_model` and the steps
    of Lightning.

    Args:
        model: what is trained.
        learning_rate: at its highest.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay, self.warmup, self.betas = learning_rate, weight_decay, warmup, betas

    def new_model(self) -> nn.Module:
        """A model like the one in training, with weights of its own."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Remember the seed: later it is another one's."""
        self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the random numbers of this step."""
        seed = int(keys(self._seed, self.global_step, self.global_rank)[0])
        if self.device.type == "cpu":
            # Where there is no GPU, `torch.manual_seed` notes down every call, with its stack, for when there is one.
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
        scheduler = warmup_cosine(optimizer, total_steps=steps, warmup=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
