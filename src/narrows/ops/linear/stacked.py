"""Many linear maps at once, each of a few tokens: experts.

The weights are far larger than what they are applied to, and are read as they lie in memory.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.linear import processor

# Maps of fewer weights than this, and products with fewer rows, are quicker in BLAS.
FEWEST_WEIGHTS = 2**17
FEWEST_ROWS = 8
# Fewer filters than this take oneDNN longer than as many.
FEWEST_FILTERS = 32
# Filters of one pixel have nothing to dilate. But on a single thread, PyTorch keeps undilated ones from oneDNN.
DILATION = 2


def stacked_linear(
    rows: Float[Tensor, "E rows D"], weight: Float[Tensor, "out E D"], bias: Float[Tensor, "E out"] | None = None
) -> Float[Tensor, "E rows out"]:
    """E linear maps at once, `torch.nn.functional.linear(rows[e], weight[:, e], bias[e])` for every e.

    Where oneDNN is the quicker one, roles change, since there are far more weights than rows: the weights are a
    channels-last image of `out` pixels, read as they lie in memory, and the rows are its filters, in E groups.
    """
    # A compiler lays out gradients by itself, and a trace that others will run holds no functions of ours.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if traced or not (torch.is_grad_enabled() or processor.convolves(rows)):
        return _multiplied(rows, weight, bias)
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    mapped = _StackedLinear.apply(rows, weight, bias)
    assert isinstance(mapped, Tensor)
    return mapped


class _StackedLinear(torch.autograd.Function):
    """The gradient of the weights lies in memory as weights do: brought into order, it would cost twice the rest.

    Where oneDNN is the quicker one, it computes every product with the weights, and BLAS the gradient of the rows. What
    oneDNN computes lies in memory as `[out, E, rows]`, and is returned as a view of that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not processor.convolves(rows) or not _is_wide(weight) or rows.shape[1] < FEWEST_ROWS:
            return _multiplied(rows, weight, bias)
        groups = weight.shape[1]
        mapped = F.conv_transpose2d(_image(weight), _filters(rows), groups=groups, dilation=DILATION)
        mapped = mapped.squeeze(3).squeeze(0).unflatten(0, (groups, -1))[:, : rows.shape[1]]
        if rows.shape[1] < FEWEST_FILTERS:  # Do not keep what comes of the zeros.
            mapped = mapped.clone()
        return mapped if bias is None else mapped.add_(bias[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.bmm(grad, weight.transpose(0, 1))
            if rows.stride(-1) != 1:  # What comes next would read the one along and the other across.
                grad_rows = _features_first(grad_rows)
        if ctx.needs_input_grad[1]:
            convolves = processor.convolves(rows) and _is_wide(weight)
            grad_weight = (_grad_weight_convolved if convolves else _grad_weight)(grad, rows)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(1)
        return grad_rows, grad_weight, grad_bias

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = tangents
        # A constant's tangent is None.
        moved = rows.new_zeros(*rows.shape[:2], len(weight)) if of_bias is None else of_bias[:, None]
        if of_rows is not None:
            moved = moved + _multiplied(of_rows, weight, None)
        if of_weight is not None:
            moved = moved + _multiplied(rows, of_weight, None)
        return moved.expand(*rows.shape[:2], -1)


def _grad_weight(grad: Tensor, rows: Tensor) -> Tensor:
    """`[out, E, D]`, of the gradient `[E, rows, out]` and the rows `[E, rows, D]`."""
    if torch.is_grad_enabled():  # second derivatives, which there are none of through `out`
        return torch.bmm(grad.mT, rows).transpose(0, 1)
    in_order = grad.new_empty(grad.shape[2], len(rows), rows.shape[2])
    torch.bmm(grad.mT, rows, out=in_order.transpose(0, 1))
    return in_order


def _grad_weight_convolved(grad: Tensor, rows: Tensor) -> Tensor:
    """The same with the gradient as an image and the rows as its filters."""
    groups, filters = len(rows), _filters(rows)
    image = F.pad(_features_first(grad).permute(2, 0, 1), (0, filters.shape[1] - grad.shape[1]))
    products = F.conv2d(_image(image), filters, groups=groups, dilation=DILATION)
    return products.squeeze(3).squeeze(0).mT.unflatten(1, (groups, -1))


def _multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    maps = weight.permute(1, 2, 0)
    return torch.bmm(rows, maps) if bias is None else torch.baddbmm(bias[:, None], rows, maps)


def _is_wide(weight: Tensor) -> bool:
    return weight[:, 0].numel() >= FEWEST_WEIGHTS


def _image(features: Tensor) -> Tensor:
    """`[out, E, n]` as an image `[1, E n, out, 1]`, channels last."""
    return features.flatten(1)[None, :, None].permute(0, 3, 1, 2)


def _filters(rows: Tensor) -> Tensor:
    """`[E, n, D]` as filters `[E D, n, 1, 1]`, rows of zeros added where they are too few."""
    return F.pad(rows.mT, (0, max(0, FEWEST_FILTERS - rows.shape[1]))).flatten(0, 1)[..., None, None]


def _features_first(rows: Tensor) -> Tensor:
    """The same `[E, n, F]`, lying in memory as `[F, E, n]`. PyTorch is quick only where a matrix is transposed."""
    return rows.flatten(0, 1).t().contiguous().unflatten(1, rows.shape[:2]).permute(1, 2, 0)
