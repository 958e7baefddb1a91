"""Checks of arguments and submodules that several rooms share. They trace under `torch.compile` and `torch.export`."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType

# Modules of torch that are their weight and bias, if nothing was put on or in them.
PLAIN = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GRUCell)


def check_tokens(name: str, tokens: Tensor, *, dim: int | None = None, layout: str = "[B, N, D]") -> None:
    """Raise unless `tokens` is a floating-point tensor of as many axes as `layout` names, the last of size `dim`."""
    expected = layout if dim is None else f"{layout} with D = {dim}"
    if not torch.is_floating_point(tokens):
        raise InvalidType(name, expected=f"a floating-point tensor {expected}", got=f"dtype {tokens.dtype}")
    if tokens.ndim != layout.count(",") + 1 or (dim is not None and tokens.shape[-1] != dim):
        raise InvalidArgument(name, expected=f"shape {expected}", got=f"shape {tuple(tokens.shape)}")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], *, layout: str = "[B, N]") -> None:
    """Raise unless `mask` is None or boolean of `shape`."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise InvalidType(
            name, expected="a boolean tensor, True at real tokens", got=f"dtype {mask.dtype}", hint="Use mask.bool()."
        )
    if tuple(mask.shape) != tuple(shape):
        raise InvalidArgument(name, expected=f"shape {layout} = {tuple(shape)}", got=f"shape {tuple(mask.shape)}")


def as_tokens(tokens: Tensor, mask: Tensor | None, *, dim: int) -> tuple[Tensor, Tensor | None, tuple[int, int] | None]:
    """Tokens `[B, N, D]`, their mask `[B, N]`, and the grid `(H, W)` they stand on where an image was given.

    Args:
        tokens: `[B, N, D]`, or an image `[B, D, H, W]` whose pixels are tokens, row by row.
        mask: `[B, N]` or `[B, H, W]`, True at real tokens.
        dim: D.
    """
    if tokens.ndim != 4:
        check_tokens("tokens", tokens, dim=dim)
        check_mask("mask", mask, tokens.shape[:2])
        return tokens, mask, None
    if tokens.shape[1] != dim:
        raise InvalidArgument("tokens", expected=f"images [B, {dim}, H, W]", got=f"shape {tuple(tokens.shape)}")
    check_tokens("tokens", tokens, layout="[B, D, H, W]")
    batch, _, height, width = tokens.shape
    check_mask("mask", mask, (batch, height, width), layout="[B, H, W]")
    return tokens.flatten(2).mT.contiguous(), None if mask is None else mask.flatten(1), (height, width)


def check_positive(**values: Any) -> None:
    """Raise on the first of the named integers that is not at least 1.

    Any integer type will do, NumPy's among them, and so will a size that is still open under `torch.export`; a truth
    value is not an integer.
    """
    for name, value in values.items():
        if not _is_integer(value):
            raise InvalidType(name, expected="a positive integer", got=repr(value))
        if value < 1:
            raise InvalidArgument(name, expected="a positive integer", got=value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, int | torch.SymInt):
        return not isinstance(value, bool)
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise InvalidArgument(name, expected=f"one of {choices}", got=repr(value))


def why_not_plain(
    modules: Iterable[tuple[str, nn.Module]], *, kinds: tuple[type[nn.Module], ...] = PLAIN
) -> str | None:
    """The first reason why some of these modules must be called, or None where all are plain.

    A module is plain where calling it does what its weight and bias say, and nothing else. A layer calls its
    submodules, so that LoRA, hooks, quantised weights, pruning and offloading work as in any module; a fast form that
    multiplies weights with one another beforehand calls none of them, and may run only where all of them are plain.

    Args:
        modules: names and modules, as `named_modules` gives them.
        kinds: the classes that the fast form knows how to fold.
    """
    for name, module in modules:
        kind = type(module)
        if kind not in kinds:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in module.__dict__:  # accelerate's offloading, among others
            return f"{name}.forward was replaced"
        for parameter_name, parameter in module._parameters.items():
            if hasattr(parameter, "__tensor_flatten__"):  # a tensor that stands for others: quantised, sharded
                return f"{name}.{parameter_name} is a {type(parameter).__name__}"
    return None
