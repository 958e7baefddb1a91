"""Linear maps and feed-forward networks of many experts as batched products.

Rows of expert e are `rows[e]`, in memory as they come from the mixture: `[R, E, D]`, all experts of a row side by side.
Products take them as they lie, and results that have to lie so again are written there, with no copy in between.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from narrows.precision import accumulation_dtype, autocast_off, compute_dtype, is_transformed

# Bytes: blocks up to this size share a segment in PyTorch's allocator on a GPU; holding less costs launches alone.
SMALL = 2**20

_gelu_into, _gelu_backward_into = torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input


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


def activation(hidden: Float[Tensor, "*batch F"], *, gated: bool) -> Float[Tensor, "*batch H"]:
    """GELU; of gated experts the first half of `hidden` times GELU of the second."""
    if not gated:
        return F.gelu(hidden)
    values, gates = hidden.chunk(2, dim=-1)
    return values * F.gelu(gates)


def stacked_feed_forward(
    rows: Float[Tensor, "E R D"],
    expand: tuple[Float[Tensor, "E F D"], Float[Tensor, "E F"]],
    contract: tuple[Float[Tensor, "E D H"], Float[Tensor, "E D"]],
    *,
    gated: bool,
) -> Float[Tensor, "E R D"]:
    r"""$W_2\,\sigma(W_1 x + b_1) + b_2$ for each expert, without holding all at once what each needs only in passing.

    Without gradients, groups of experts run one after another: what is hidden in them takes no more memory than the
    rows. With gradients, what the activation is taken of is kept, and its result computed again: half of what a network
    keeps that is written as three modules. On a GPU, where an expert has so few rows that reading its weights takes
    longer than multiplying them, only the rows are kept: gradients come in groups of experts too, whose hidden values
    are computed again and never leave the cache.

    Args:
        rows: `[E, R, D]`.
        expand: weights and biases of the first map.
        contract: weights and biases of the second.
        gated: whether the first map makes values and gates.
    """
    parameters = (*expand, *contract)
    if torch.compiler.is_compiling() or is_transformed(rows, *parameters):
        return stacked_linear(activation(stacked_linear(rows, *expand), gated=gated), *contract)
    rows = rows.to(compute_dtype(rows))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *parameters))):
        with autocast_off(rows):
            return _forward_in_groups(rows, *parameters, gated)
    weight_in, bias_in, weight_out, bias_out = (tensor.to(rows.dtype) for tensor in parameters)
    with autocast_off(rows):
        if _keeps_rows_only(rows, weight_in):
            result = _FeedForward.apply(rows, weight_in, bias_in, weight_out, bias_out, gated)
        else:
            hidden = _StackedLinear.apply(rows, weight_in, bias_in)
            result = _ActivatedLinear.apply(hidden, weight_out, bias_out, gated)
    assert isinstance(result, Tensor)
    return result


def _keeps_rows_only(rows: Tensor, weight_in: Tensor) -> bool:
    few = rows.shape[1] <= rows.shape[2]
    return rows.is_cuda and few and rows.shape[0] * _bytes_of_an_expert(rows, weight_in) > SMALL


def _bytes_of_an_expert(rows: Tensor, weight_in: Tensor) -> int:
    """Memory of the hidden values of one expert."""
    return rows.shape[1] * weight_in.shape[1] * rows.element_size()


def _groups(rows: Tensor, weight_in: Tensor, share: int) -> Iterator[slice]:
    """Experts in groups whose hidden values take `1 / share` of the memory of all rows, or little memory."""
    num_experts, features, dim = weight_in.shape
    little = SMALL // max(1, _bytes_of_an_expert(rows, weight_in))
    size = max(little, math.ceil(num_experts * dim / (share * features)))
    return (slice(start, start + size) for start in range(0, num_experts, size))


def _cuts(rows: Tensor, weight_in: Tensor, features: int) -> Iterator[slice]:
    """Hidden features in slices, where those of a single expert take more memory than a group of `share=4` may."""
    most = max(1, SMALL, rows.numel() * rows.element_size() // 4)
    size = math.ceil(features / max(1, math.ceil(_bytes_of_an_expert(rows, weight_in) / most)))
    return (slice(start, start + size) for start in range(0, features, size))


def _forward_in_groups(
    rows: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor, gated: bool
) -> Tensor:
    outputs = _as_rows(rows, weight_out.shape[1])
    for part in _groups(rows, weight_in, share=1):
        matrix_in, offset_in, matrix_out, offset_out = (
            tensor[part].to(rows.dtype) for tensor in (weight_in, bias_in, weight_out, bias_out)
        )
        hidden = torch.baddbmm(offset_in[:, None], rows[part], matrix_in.mT)
        values, gates = hidden.chunk(2, dim=-1) if gated else (None, hidden)
        _gelu_into(gates, out=gates)
        active = gates if values is None else values.mul_(gates)
        torch.baddbmm(offset_out[:, None], active, matrix_out.mT, out=outputs[part])
        del hidden, values, gates, active  # before the next group makes its own
    return outputs


def _as_rows(rows: Tensor, width: int) -> Tensor:
    """Room for rows `[E, R, width]` that lie as `[R, E, width]`."""
    return rows.new_empty(rows.shape[1], rows.shape[0], width).transpose(0, 1)


def _is_plain(grad: Tensor) -> bool:
    """Whether gradients may be written where they belong: nothing differentiates, vectorises or traces what is done."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(grad):
        return False
    try:
        grad.untyped_storage()
    except NotImplementedError:  # one tensor for many, of torch.autograd.grad(is_grads_batched=True)
        return False
    return True


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
        room = _as_rows(rows, rows.shape[2]) if of_rows and _is_plain(grad) else None
        return (
            torch.bmm(grad, weight, out=room) if of_rows else None,
            torch.bmm(grad.mT, rows) if of_weight else None,
            grad.sum(1) if of_bias else None,
        )


class _ActivatedLinear(torch.autograd.Function):
    """The second map of a feed-forward network, of what the first one gives; keeps that and not its activation."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor, gated: bool) -> Tensor:
        active = activation(hidden, gated=gated)
        return torch.baddbmm(bias[:, None], active, weight.mT, out=_as_rows(hidden, weight.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])
        ctx.gated = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (hidden, weight) = grad_outputs, ctx.saved_tensors
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_weight = torch.bmm(grad.mT, activation(hidden, gated=ctx.gated)) if of_weight else None
        grad_hidden = None
        if of_hidden:
            grad_active = torch.bmm(grad, weight)
            backward = _activation_backward if _is_plain(grad) else _plain_activation_backward
            grad_hidden = backward(grad_active, hidden, ctx.gated)
        return grad_hidden, grad_weight, grad.sum(1) if of_bias else None, None


class _FeedForward(torch.autograd.Function):
    """Both maps; keeps the rows alone."""

    @staticmethod
    def forward(
        rows: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor, gated: bool
    ) -> Tensor:
        return _forward_in_groups(rows, weight_in, bias_in, weight_out, bias_out, gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:4])
        ctx.gated = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weight_in, bias_in, weight_out) = grad_outputs, ctx.saved_tensors
        if not _is_plain(grad):
            hidden = torch.baddbmm(bias_in[:, None], rows, weight_in.mT)
            grad_hidden = _plain_activation_backward(torch.bmm(grad, weight_out), hidden, ctx.gated)
            grad_weight_out = torch.bmm(grad.mT, activation(hidden, gated=ctx.gated))
            grad_rows, grad_weight_in = torch.bmm(grad_hidden, weight_in), torch.bmm(grad_hidden.mT, rows)
            return grad_rows, grad_weight_in, grad_hidden.sum(1), grad_weight_out, grad.sum(1), None
        needed = ctx.needs_input_grad
        grad_rows = _as_rows(rows, rows.shape[2]) if needed[0] else None
        grad_weight_in, grad_bias_in, grad_weight_out = (
            torch.empty_like(tensor) if wanted else None
            for tensor, wanted in zip((weight_in, bias_in, weight_out), needed[1:4], strict=True)
        )
        for part in _groups(rows, weight_in, share=4):
            hidden = torch.baddbmm(bias_in[part, None], rows[part], weight_in[part].mT)
            values, gates = hidden.chunk(2, dim=-1) if ctx.gated else (None, hidden)
            for cut in _cuts(rows, weight_in, gates.shape[-1]):
                some = None if values is None else values[..., cut]
                if grad_weight_out is not None:
                    active = F.gelu(gates[..., cut])
                    active = active if some is None else active.mul_(some)
                    torch.bmm(grad[part].mT, active, out=grad_weight_out[part, :, cut])
                    del active
                _overwrite_by_gradients(torch.bmm(grad[part], weight_out[part, :, cut]), some, gates[..., cut])
                del some
            if grad_rows is not None:
                torch.bmm(hidden, weight_in[part], out=grad_rows[part])
            if grad_weight_in is not None:
                torch.bmm(hidden.mT, rows[part], out=grad_weight_in[part])
            if grad_bias_in is not None:
                torch.sum(hidden, 1, out=grad_bias_in[part])
            del hidden, values, gates
        return grad_rows, grad_weight_in, grad_bias_in, grad_weight_out, grad.sum(1) if needed[4] else None, None


def _activation_backward(grad: Tensor, hidden: Tensor, gated: bool) -> Tensor:
    """The gradient of `hidden`; overwrites `grad`."""
    if not gated:
        return _gelu_backward_into(grad, hidden, grad_input=grad)
    result = torch.empty_like(hidden)
    (values, gates), (of_values, of_gates) = hidden.chunk(2, dim=-1), result.chunk(2, dim=-1)
    _gelu_into(gates, out=of_values).mul_(grad)
    _gelu_backward_into(grad.mul_(values), gates, grad_input=of_gates)
    return result


def _overwrite_by_gradients(grad: Tensor, values: Tensor | None, gates: Tensor) -> None:
    """The same where nothing is needed any more: hidden values become their gradients, with no memory of its own."""
    if values is None:
        _gelu_backward_into(grad, gates, grad_input=gates)
        return
    _gelu_backward_into(values.mul_(grad), gates, grad_input=values)  # of the gates
    grad.mul_(_gelu_into(gates, out=gates))
    gates.copy_(values)
    values.copy_(grad)


def _plain_activation_backward(grad: Tensor, hidden: Tensor, gated: bool) -> Tensor:
    """The same from operations that can be differentiated themselves."""
    values, gates = hidden.chunk(2, dim=-1) if gated else (None, hidden)
    wide = gates.to(accumulation_dtype(gates))
    slope = torch.special.ndtr(wide) + wide * torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    slope = slope.to(grad.dtype)
    if values is None:
        return grad * slope
    return torch.cat((grad * F.gelu(gates), grad * values * slope), dim=-1)
