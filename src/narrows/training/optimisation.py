"""How weights are trained: what decays, and how the learning rate goes."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not: biases, norms, and what `model.no_weight_decay()` names."""
    exempt: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # pyright: ignore
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2].endswith("bias")
        (kept if parameter.ndim <= 1 or is_bias or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_cosine(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.1) -> LambdaLR:
    """Learning rate that rises linearly over the first `warmup` of all steps and falls to 0 along a cosine."""
    rising = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total_steps - rising))))

    return LambdaLR(optimizer, factor)
