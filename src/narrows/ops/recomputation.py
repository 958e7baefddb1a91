"""Activation checkpointing of functions of tensors: backward keeps the arguments and computes the rest again."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from narrows.precision import has_autocast, is_transformed

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor])


def checkpointed(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, of which autograd keeps the arguments only.

    Not inside a transformation of `torch.func`, which takes no hooks on saved tensors. `torch.utils.checkpoint` serves
    compilers; in eager code its hooks on each saved tensor cost the host more than a short function itself.
    """
    if is_transformed(*(argument for argument in args if isinstance(argument, Tensor))):
        return function(*args)
    if torch.compiler.is_compiling():
        result: Any = checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
    else:
        result = _Recomputed.apply(function, *args)
    return result


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps its arguments for backward and nothing else."""

    @staticmethod
    def forward(function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`."""
        return function(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        """Keep the arguments, and the autocast they met."""
        function, *args = inputs
        ctx.set_materialize_grads(False)
        device = next(argument.device.type for argument in args if isinstance(argument, Tensor))
        ctx.function, ctx.autocast = function, nullcontext
        if has_autocast(device):
            autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
            ctx.autocast = partial(torch.autocast, device, **autocast)
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in args]
        ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in args))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:  # noqa: ARG004
        """Inside a `torch.func.vmap` over other tensors: `checkpointed` lets none through that is batched."""
        result = _Recomputed.apply(*args)
        return result, None if isinstance(result, Tensor) else (None,) * len(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what is computed again; with `create_graph` as differentiable as it is."""
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        saved = zip(ctx.saved_tensors, needed, strict=True)
        with torch.enable_grad():
            # One argument may depend on another.
            saved = [t if t is None else t.view_as(t) if again else t.detach().requires_grad_(n) for t, n in saved]
            args = [other if t is None else t for t, other in zip(saved, ctx.others, strict=True)]
            inputs = [t for t, n in zip(saved, needed, strict=True) if t is not None and n]
            with ctx.autocast():
                result = ctx.function(*args)
            outputs = [result] if isinstance(result, Tensor) else result
            graded = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            if not graded:
                return (None,) * (1 + len(needed))
            outputs, given = zip(*graded, strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, given, create_graph=again, allow_unused=True))
        return None, *(next(found) if n else None for n in needed)
