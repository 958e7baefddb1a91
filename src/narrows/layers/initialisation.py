"""How parameters of layers are drawn, at construction and by `reset_parameters`, and how views of them are made."""

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


def detached_under_no_grad(parameter: Tensor) -> Tensor:
    """`parameter`, for a view that a module will be called with; detached where no gradients are recorded.

    A view that is made of a parameter under `torch.no_grad` says that it requires a gradient and has no function to
    give it one. `torch.utils.flop_counter` ends with an error as soon as a module is called with it.
    """
    return parameter if torch.is_grad_enabled() else parameter.detach()


def reset_like_keras(layer: nn.Module) -> None:
    """Initialise linear maps, recurrent cells and LayerNorms as the published code does; not the initial slots."""
    own = (child for name, child in layer.named_children() if name != "initial_slots")
    for module in (module for child in own for module in child.modules()):
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            draw_(module.weight, nn.init.xavier_uniform_)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.GRUCell):
            draw_(module.weight_ih, nn.init.xavier_uniform_)
            draw_(module.weight_hh, nn.init.orthogonal_)
            for bias in (module.bias_ih, module.bias_hh) if module.bias else ():
                nn.init.zeros_(bias)
