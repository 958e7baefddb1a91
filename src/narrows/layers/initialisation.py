"""Parameters of layers: how they are drawn, at construction and by `reset_parameters`, and how a batch shares one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from narrows.precision import at_least_float32


def draw_(parameter: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Fill `parameter` with what `draw`, one of `torch.nn.init`'s functions, puts into a tensor of its shape.

    It is drawn in float32 or better: `torch.nn.init.orthogonal_` has no kernel for bfloat16, and `trunc_normal_` makes
    outliers there, because uniform numbers close to 1 round to 1.
    """
    with torch.no_grad():
        drawn = at_least_float32(torch.empty_like(parameter))
        draw(drawn)
        parameter.copy_(drawn)


def reset_submodules(module: nn.Module) -> None:
    """Draw every parameter in `module` anew but those that are its own."""
    for child in module.children():
        if callable(reset := getattr(child, "reset_parameters", None)):
            reset()
        else:
            reset_submodules(child)


def for_each_sample(parameter: Tensor, batch: int) -> Tensor:
    """A view `[batch, *parameter.shape]` of a parameter that all samples share.

    Under `torch.no_grad` it is a view of the detached parameter. A view that is made there of the parameter itself says
    that it requires a gradient and has no function to give it one, which ends `torch.utils.flop_counter` with an error
    as soon as a module is called with it.
    """
    if not torch.is_grad_enabled():
        parameter = parameter.detach()
    return parameter.expand(batch, *parameter.shape)
