"""Checks of arguments that several rooms share. They trace under `torch.compile` and `torch.export`."""

import torch
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType


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


def check_positive(**values: int) -> None:
    """Raise on the first of the named integers that is not at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidType(name, expected="a positive integer", got=repr(value))
        if value < 1:
            raise InvalidArgument(name, expected="a positive integer", got=value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise InvalidArgument(name, expected=f"one of {choices}", got=repr(value))
