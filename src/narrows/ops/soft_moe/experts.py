"""Linear maps of many experts as one batched product."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.precision import autocast_off, compute_dtype, is_transformed


def stacked_linear(
    rows: Float[Tensor, "E R in_features"],
    weight: Float[Tensor, "E out_features in_features"],
    bias: Float[Tensor, "E out_features"],
) -> Float[Tensor, "E R out_features"]:
    r"""$x_e W_e^T + b_e$ for each expert e, as `torch.nn.functional.linear` has it.

    `torch.bmm` gives the gradient of a transposed factor in transposed memory, which training would have to bring into
    the order of the weights; here it comes in that order, as that of `nn.Linear` does.
    """
    rows, weight, bias = (tensor.to(compute_dtype(tensor)) for tensor in (rows, weight, bias))
    with autocast_off(rows):
        if is_transformed(rows, weight, bias):
            return torch.baddbmm(bias[:, None], rows, weight.mT)
        result = _StackedLinear.apply(rows, weight, bias)
    assert isinstance(result, Tensor)
    return result


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias[:, None], rows, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weight) = grad_outputs, ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if of_rows else None,
            torch.bmm(grad.mT, rows) if of_weight else None,
            grad.sum(1) if of_bias else None,
        )
