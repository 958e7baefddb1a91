"""Calls of a model while it is reduced: its own methods are answered, and what is known of a call is noted."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction.hosts.base import HostModel
from narrows.adapters.token_reduction.tokens import Call, TokenState
from narrows.errors import InvalidArgument

_ANSWERS = "narrows_answers"


def tracing() -> bool:
    """Whether a compiler or an exporter traces: shapes must not depend on values then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def is_computed_again() -> bool:
    """Whether a backward pass runs, in which activation checkpointing calls what it keeps no activations of again."""
    try:
        # Only there it is taken; of what public names there are, none tells.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: None)  # pyright: ignore
    except RuntimeError:
        return False
    return True


def drive(module: nn.Module, answers: Mapping[str, Callable[..., Any]]) -> None:
    """Let `answers[name](module, own, *args, **kwargs)` answer calls of the method `name` of the module.

    By a subclass of its class, so that replicas (`DataParallel`), copies and classes put on top (FSDP2) pass themselves
    as `module`: `own` is the method that was replaced, of the module that is called.
    """
    module.__dict__[_ANSWERS] = dict(answers)
    module.__class__ = _driven(type(module), tuple(answers))


def release(module: nn.Module) -> None:
    """Undo `drive`; under a class that was put on top since, methods are the module's own again."""
    del module.__dict__[_ANSWERS]
    if "_narrows_undriven" in vars(type(module)):
        module.__class__ = type(module)._narrows_undriven  # pyright: ignore[reportAttributeAccessIssue]


def is_driven(module: nn.Module) -> bool:
    """Whether a reduction answers calls of the module."""
    return _ANSWERS in vars(module)


@cache
def _driven(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def pickled(self: nn.Module, _: object) -> Any:
        return _rebuilt, (kind, names), dict(vars(self))

    methods: dict[str, Any] = {name: _answered(name, getattr(kind, name)) for name in names}
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**named, **methods, "__reduce_ex__": pickled, "_narrows_undriven": kind})


def _rebuilt(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of the class that `_driven` makes, before its state is set: classes made by hand are not pickled."""
    driven = _driven(kind, names)
    return driven.__new__(driven)


def _answered(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answers = getattr(self, _ANSWERS, None)
        if answers is None:
            return own(self, *args, **kwargs)
        return answers[name](self, partial(own, self), *args, **kwargs)

    return method


# What the current call of a model in this thread is known by, until its first block attaches it to the tokens.
_CURRENT = threading.local()


def current_call() -> Call:
    """What is known of the call of the model that this thread is in."""
    return getattr(_CURRENT, "call", _UNKNOWN)


# Blocks that somebody calls one by one, and may read after each.
_UNKNOWN = Call(reader="blocks")


def note(**known: Any) -> None:
    """Add to what is known of the current call."""
    _CURRENT.call = replace(current_call(), **known)


def hand_over(index: int, state: TokenState) -> None:
    """Remember what the block at `index` attached to the tokens it returns, as long as the model is being called."""
    if not tracing() and getattr(_CURRENT, "inside", None) is not None:
        _CURRENT.handed = index, state


def handed_over(index: int, shape: tuple[int, ...]) -> TokenState | None:
    """What the block before `index` handed over, for tokens of this shape that lost it.

    What stands around blocks may return other tensors for the same tokens: FSDP2 and mixed precision do, and hooks.
    """
    last, state = getattr(_CURRENT, "handed", None) or (None, None)
    if state is None or last != index - 1 or (state.call.reader == "blocks" and state.steps):
        return None
    return state if shape == state.layout.shape else None


def noted(run: Callable[[], Any], **known: Any) -> Any:
    """What `run` gives, with a note for the model that is called in it."""
    before = current_call()
    note(**known)
    try:
        return run()
    finally:
        _CURRENT.call = before


def averaging(_: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Answers `forward` of a head that averages what the host in it returns over the grid."""
    return noted(partial(own, *args, **kwargs), averaged=True)


class Tower:
    """Answers the methods of a host by which it is called.

    Args:
        host: the model.
        method: what reduces, by its name.
    """

    def __init__(self, host: HostModel, method: str) -> None:
        self.host, self.method = host, method

    def run(self, name: str, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the module's own method, with a note of who reads its tokens.

        Raises:
            InvalidArgument: `torch.jit.trace` traces, or the older exporter of ONNX, which is built on it.
        """
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise InvalidArgument(
                "model",
                expected="torch.export, or torch.onnx.export(..., dynamo=True)",
                got=f"torch.jit.trace or torch.onnx.export(..., dynamo=False) of a model reduced by {self.method}",
                hint="Those write the number of images of the example into the program.",
            )
        if getattr(_CURRENT, "inside", None) is self:
            return own(*args, **kwargs)
        before, reader = (current_call(), getattr(_CURRENT, "inside", None)), self.host.reader(module, name, kwargs)
        _CURRENT.inside = self
        masked = any("mask" in argument and value is not None for argument, value in kwargs.items())
        note(
            reader=reader,
            grid=None,
            tower=None if tracing() else module,
            masked=masked,
            differentiable=torch.is_grad_enabled(),
        )
        try:
            result = own(*args, **kwargs)
            return self.host.averageable(result, kwargs) if before[0].averaged else result
        finally:
            _CURRENT.call, _CURRENT.inside = before
            _CURRENT.handed = None

    def note_images(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the embedding: the grid of the tokens that the images become."""
        if getattr(_CURRENT, "inside", None) is self:
            images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            note(grid=self.host.grid_of(images))
