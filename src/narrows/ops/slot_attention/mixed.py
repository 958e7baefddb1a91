"""Slot attention whose products with tokens run in the dtype of the tokens, and that keeps one grid for backward."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.slot_attention.common import from_tokens, grouped, mean_weights, products, read
from narrows.precision import accumulation_dtype, autocast_off, is_transformed


def slot_attention(
    queries: Float[Tensor, "B H K E"],
    bias: Float[Tensor, "B H K"] | None,
    keys: Float[Tensor, "B G N E"],
    values: Float[Tensor, "B G N V"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    joint_heads: bool,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "B H K V"], Float[Tensor, "B H K N"]]:
    """Products with tokens in the dtype of the keys, everything else in float32 or better. Twice differentiable."""
    with autocast_off(keys):
        arguments = (queries, bias, keys, None if values is keys else values, mask, slot_mask, joint_heads, eps, dtype)
        run = read if is_transformed(*(x for x in arguments[:4] if x is not None)) else _Read.apply
        return run(*arguments)  # pyright: ignore[reportReturnType]


class _Read(torch.autograd.Function):
    """Of a whole read, backward keeps the arguments and the attention.

    Per slot, with w the weights of the mean, g the gradient of the mean u and A the attention:

        dA = (g . v - g . u) / sum A,   dL = softmax'(dA),   dk = dL^T q,   dv = w^T g

    Where values are the keys themselves, the sum of dk and dv is one product, [dL; w]^T [q; g].
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return read(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, bias, keys, values, mask, _, ctx.joint_heads, ctx.eps, _ = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(queries, keys, values, mask, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_updates, grad_attention = gradients
        queries, keys, values, mask, updates, attention = ctx.saved_tensors
        weights, total = mean_weights(attention, mask, ctx.eps)
        grad_updates, updates = grad_updates.to(attention.dtype), updates.to(attention.dtype)
        centred = _over_tokens(grad_updates, keys if values is None else values)
        centred = centred - (grad_updates * updates).sum(-1, keepdim=True)
        product = attention * (centred / total + grad_attention)
        axes = (1, 2) if ctx.joint_heads else (2,)
        grad_logits = product - attention * product.sum(axes, keepdim=True)
        grad_keys = grad_values = None
        if values is None and ctx.needs_input_grad[2]:
            left, right = torch.cat([grad_logits, weights], 2), torch.cat([queries, grad_updates], 2)
            grad_keys = _to_tokens(left, right, keys)
        elif values is not None:
            grad_keys = _to_tokens(grad_logits, queries, keys) if ctx.needs_input_grad[2] else None
            grad_values = _to_tokens(weights, grad_updates, values) if ctx.needs_input_grad[3] else None
        grad_bias = grad_logits.sum(-1) if ctx.has_bias else None
        return from_tokens(grad_logits, keys), grad_bias, grad_keys, grad_values, None, None, None, None, None


def _over_tokens(rows: Float[Tensor, "B H K E"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B H K N"]:
    """The product of every row with every token, in float32 or better."""
    return products(rows, tokens).to(accumulation_dtype(rows, tokens))


def _to_tokens(
    weights: Float[Tensor, "B H K N"], rows: Float[Tensor, "B H K E"], tokens: Float[Tensor, "B G N E"]
) -> Float[Tensor, "B G N E"]:
    """For each token the sum of the rows under its column of weights, in the shape and dtype of `tokens`."""
    return grouped(weights, tokens).mT @ grouped(rows, tokens)
