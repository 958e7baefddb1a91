"""Checks of arguments and submodules that several rooms share. They trace under `torch.compile` and `torch.export`."""

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType

# Modules of torch that are their weight and bias, if nothing was put on or in them.
PLAIN = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GRUCell)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A constructor or function that first checks the kinds of its arguments against its annotations.

    Numbers have to be finite, an integer is no truth value, and a sequence is no string. Annotations other than
    numbers, strings, tensors, modules, devices, and sequences and unions of them are not looked at.

    >>> @checked
    ... def repeat(text: str, times: int = 2) -> str:
    ...     return text * times
    >>> repeat("a", "3")
    Traceback (most recent call last):
    narrows.errors.InvalidType: times: expected an integer, got '3'.
    """
    hints: dict[str, Any] = {}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not hints:  # only now, since annotations may name what is defined later
            hints.update(get_type_hints(function))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and not _fits(value, hints[name]):
                error = InvalidArgument if isinstance(value, float) and not math.isfinite(value) else InvalidType
                raise error(name, expected=_described(hints[name]), got=repr(value))
        return function(*args, **kwargs)

    return call


_DESCRIPTIONS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    NoneType: "None",
    torch.device: "a device, such as 'cuda:0'",
    torch.dtype: "a dtype, such as torch.bfloat16",
    torch.Generator: "a torch.Generator",
    Tensor: "a tensor",
    nn.Module: "a torch.nn.Module",
}


def _described(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        kinds = [part for part in parts if not (part is str and torch.device in parts)]
        *first, last = dict.fromkeys(map(_described, kinds))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(hint) is not None and parts and issubclass(get_origin(hint), Sequence):
        if get_origin(hint) is tuple and parts[-1] is not ...:
            return f"({', '.join(map(_described, parts))})"
        return f"a sequence, each {_described(parts[0])}"
    return _DESCRIPTIONS.get(Tensor if hasattr(hint, "array_type") else hint) or getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if torch.device in parts and isinstance(value, str):
            return _names_device(value)
        return any(_fits(value, part) for part in parts)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return _is_integer(value)
    if hint is float:
        real = isinstance(value, Real | torch.SymFloat) and not isinstance(value, bool)
        return real and (isinstance(value, torch.SymInt | torch.SymFloat) or math.isfinite(value))
    if hasattr(hint, "array_type"):  # jaxtyping's, whose axes are checked where they are used
        return isinstance(value, Tensor)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        if origin is tuple and parts[-1] is not ...:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(each, parts[0]) for each in value)
    if origin is not None:
        return callable(value) if origin is Callable else not isinstance(origin, type) or isinstance(value, origin)
    return hint not in _DESCRIPTIONS or isinstance(value, hint)


def _names_device(value: str) -> bool:
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


def check_tokens(name: str, tokens: Tensor, *, dim: int | None = None, layout: str = "[B, N, D]") -> None:
    """Raise unless `tokens` is a floating-point tensor of as many axes as `layout` names, the last of size `dim`."""
    expected = layout if dim is None else f"{layout} with D = {dim}"
    check_tensor(name, tokens, expected=f"a floating-point tensor {expected}")
    if not torch.is_floating_point(tokens):
        raise InvalidType(name, expected=f"a floating-point tensor {expected}", got=f"dtype {tokens.dtype}")
    if tokens.ndim != layout.count(",") + 1 or (dim is not None and tokens.shape[-1] != dim):
        raise InvalidArgument(name, expected=f"shape {expected}", got=f"shape {tuple(tokens.shape)}")


def check_tensor(name: str, value: object, *, expected: str = "a tensor") -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise InvalidType(name, expected=expected, got=f"a {type(value).__name__}")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], *, layout: str = "[B, N]") -> None:
    """Raise unless `mask` is None or boolean of `shape`."""
    if mask is None:
        return
    check_tensor(name, mask, expected=f"None or a boolean tensor {layout}")
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
    check_tensor("tokens", tokens, expected=f"tokens [B, N, {dim}] or images [B, {dim}, H, W]")
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


def check_share(**values: int | float) -> None:
    """Raise on the first of the named numbers that is not a share in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InvalidArgument(name, expected="a share in [0, 1)", got=value)


def check_not_negative(**values: int | float) -> None:
    """Raise on the first of the named numbers that is below 0."""
    for name, value in values.items():
        if not value >= 0:  # no number is neither
            raise InvalidArgument(name, expected="a number of 0 or more", got=value)


def check_positive_number(**values: Any) -> None:
    """Raise on the first of the named numbers that is not positive and finite."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat):
            raise InvalidType(name, expected="a positive number", got=repr(value))
        if not 0 < value < float("inf"):  # pyright: ignore[reportOperatorIssue]
            raise InvalidArgument(name, expected="a positive number", got=value)


def check_generator(generator: torch.Generator | None) -> None:
    """Raise unless `generator` is None or a generator of torch's."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidType("generator", expected="a torch.Generator or None", got=repr(generator))


def _is_integer(value: Any) -> bool:
    if isinstance(value, int | torch.SymInt):
        return not isinstance(value, bool)
    if isinstance(value, np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return False  # NumPy 1 takes its truth values for numbers
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str):
        raise InvalidType(name, expected=f"one of {choices}", got=repr(value))
    if value not in choices:
        raise InvalidArgument(name, expected=f"one of {choices}", got=repr(value))


def check_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "cuda:1" or "mps" names here; "auto" is CUDA where there is any.

    Raises:
        InvalidArgument: another name, or a device that this machine does not have.
    """
    known = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d{1,3}))?", device)
    if known is None:
        raise InvalidArgument("device", expected="'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'", got=repr(device))
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and gpus == 0:
        raise InvalidArgument("device", expected="'cpu' or 'auto' on a machine without CUDA", got=repr(device))
    if known[1] is not None and int(known[1]) >= gpus:
        last = f" to 'cuda:{gpus - 1}'" if gpus > 1 else ""
        raise InvalidArgument("device", expected=f"'cuda:0'{last}, which this machine has", got=repr(device))
    if device == "mps" and not torch.backends.mps.is_available():
        raise InvalidArgument("device", expected="'cpu' or 'auto' on a machine without MPS", got="'mps'")
    return torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)


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
