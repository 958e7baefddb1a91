"""Whether submodules are plain: whether calling them does what their weights and biases say, and nothing else.

A layer calls its submodules, so that LoRA, hooks, quantised weights, pruning and offloading work as in any module. A
fast form that multiplies weights with one another beforehand calls none of them: it may run only where all are plain.
"""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

PLAIN = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GRUCell, nn.GELU, nn.ReLU, nn.Identity, nn.Dropout)


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is exactly one of torch's own simple layers, with nothing put on or in it."""
    return why_not_plain((("", module),)) is None


def why_not_plain(
    modules: Iterable[tuple[str, nn.Module]],
    *,
    kinds: tuple[type[nn.Module], ...] = PLAIN,
    containers: tuple[type[nn.Module], ...] = (),
) -> str | None:
    """The first reason why some of these modules must be called, or None where all are plain.

    Args:
        modules: names and modules, as `named_modules` gives them.
        kinds: the classes that the fast form knows how to fold.
        containers: classes that may stand among them because all they do is to call their own submodules.
    """
    for name, module in modules:
        kind = type(module)
        if kind not in kinds and kind not in containers:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in module.__dict__:  # accelerate's offloading, among others
            return f"{name}.forward was replaced"
        for parameter_name, parameter in module._parameters.items():
            if hasattr(parameter, "__tensor_flatten__"):  # a tensor that stands for others: quantised, sharded
                return f"{name}.{parameter_name} is a {type(parameter).__name__}"
    return None


def linear_part(
    module: nn.Module, rows: Float[Tensor, "*batch D"], start: int, stop: int
) -> Float[Tensor, "*batch out"]:
    """`module(rows)[..., start:stop]`; of a plain `nn.Linear` nothing else is computed."""
    if not (isinstance(module, nn.Linear) and is_plain(module)):
        return module(rows)[..., start:stop]
    return F.linear(rows, module.weight[start:stop], None if module.bias is None else module.bias[start:stop])
