"""oneDNN's product of matrices, which PyTorch keeps for its compiler, as an operation with derivatives.

The operator behind it is not public: `torch.compile` emits it for linear layers that it freezes. It has no derivatives,
and the compiler takes it with frozen weights only, which is why `narrows::linear` stands before it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("narrows", "DEF")
_library.define("linear(Tensor tokens, Tensor weight, Tensor? bias, bool gelu) -> Tensor")


def can_run() -> bool:
    """Whether it can take part in what is going on: not in a program that others will run, nor in a compiled training.

    Compilers make one graph of both directions, in which they must know the parts.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return not (torch.compiler.is_compiling() and torch.is_grad_enabled())


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear(tokens, weight, bias)`, and `gelu` of that."""
    if torch.compiler.is_compiling() or not _is_differentiated():
        return torch.ops.narrows.linear(tokens, weight, bias, gelu)
    mapped = _Linear.apply(tokens, weight, bias, gelu)
    assert isinstance(mapped, Tensor)
    return mapped


def _is_differentiated() -> bool:
    """Whether a derivative or a transform of `torch.func` may be asked for: `autograd.Function` takes its time."""
    return (
        torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()  # pyright: ignore
    )


class _Linear(torch.autograd.Function):
    """The operation with its derivatives. Of a GELU only what went in is kept, and the map is computed once more."""

    @staticmethod
    def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        return torch.ops.narrows.linear(tokens, weight, bias, gelu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.gelu = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, _ = ctx.saved_tensors
        grad = _through_gelu(ctx, grad_outputs[0])
        rows, grad_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (tokens, grad))
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_tokens = linear(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.t() @ rows  # MKL is the quicker one here
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_tokens, grad_weight, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tokens, weight, _ = ctx.saved_tensors
        of_tokens, of_weight, of_bias, _ = tangents
        # A constant's tangent is None.
        moved = tokens.new_zeros(*tokens.shape[:-1], weight.shape[0]) if of_bias is None else of_bias
        if of_tokens is not None:
            moved = moved + F.linear(of_tokens, weight)
        if of_weight is not None:
            moved = moved + F.linear(tokens, of_weight)
        return _through_gelu(ctx, moved.expand(*tokens.shape[:-1], -1))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:  # noqa: ARG004
        mapped = torch.vmap(F.linear, in_dims[:3])(*inputs[:3])
        return F.gelu(mapped) if inputs[3] else mapped, 0


def _through_gelu(ctx: Any, direction: Tensor) -> Tensor:
    """Times the slope of the GELU at what it was applied to, computed anew."""
    if not ctx.gelu:
        return direction
    return torch.ops.aten.gelu_backward(direction, F.linear(*ctx.saved_tensors))


@torch.library.impl(_library, "linear", "CPU")
def _run(tokens: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "gelu" if gelu else "none", [], "none")


@torch.library.register_fake("narrows::linear", lib=_library)
def _shape(tokens: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:  # noqa: ARG001
    return tokens.new_empty(*tokens.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.narrows.linear)
def _flops(tokens: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * torch.Size(tokens[:-1]).numel() * weight[0] * weight[1]
