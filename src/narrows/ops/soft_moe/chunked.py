"""Soft mixture of experts in memory linear in N and in S: nothing of size N x S is ever kept.

Dispatch is attention of the slots over the tokens, combine attention of the tokens over the slots. Forward is PyTorch's
fused attention, and so is backward on a GPU, in the widths and dtypes that all its kernels take: a derivative of first
order. Everywhere else backward recomputes the weights of D queries at a time, whose logits take as much memory as the
keys: PyTorch has no fused kernel there, and would keep N x S.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.attention import attention
from narrows.precision import accumulation_dtype, autocast_off, compute_dtype, is_transformed


class _Attention(torch.autograd.Function):
    """softmax(queries keys^T) values, with at least one key of each sample allowed by the mask."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return _fused(queries, keys, values, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs
        queries, keys, values, mask = ctx.saved_tensors
        dtype, wide = queries.dtype, accumulation_dtype(queries)
        grad_queries = []
        grad_keys, grad_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        width = queries.shape[2]
        for chunk, chunk_grad in zip(queries.split(width, 1), grad.split(width, 1), strict=True):
            logits = chunk @ keys.mT
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None], torch.finfo(dtype).min)
            weights = logits.softmax(-1, dtype=wide)
            grad_values += weights.to(dtype).mT @ chunk_grad
            grad_weights = chunk_grad @ values.mT
            grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
            grad_logits = grad_logits.to(dtype)
            grad_queries.append(grad_logits @ keys)
            grad_keys += grad_logits.mT @ chunk
        return torch.cat(grad_queries, 1), grad_keys.to(dtype), grad_values.to(dtype), None


def _fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else mask[:, None, None]
    return attention(queries[:, None], keys[:, None], values[:, None], mask, scale=1.0)[:, 0]


def _is_fused_both_ways(queries: Tensor) -> bool:
    return queries.is_cuda and queries.dtype != torch.float64 and queries.shape[2] % 8 == 0


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:  # A sample without any key reads all of them evenly; the caller clears what it gets.
        mask = mask | ~mask.any(-1, keepdim=True)
    if is_transformed(queries, keys, values) or _is_fused_both_ways(queries):
        return _fused(queries, keys, values, mask)
    result = _Attention.apply(queries, keys, values, mask)
    assert isinstance(result, Tensor)
    return result


def soft_moe(
    values: Float[Tensor, "B N D"],
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    experts: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Attention from slots to tokens, the experts, attention from tokens to slots; keeps only what has N or S rows."""
    dtype = compute_dtype(values)
    with autocast_off(values):
        token_keys = token_keys.to(dtype)
        slot_keys = slot_keys.to(dtype).expand(values.shape[0], -1, -1)
        slots = _attend(slot_keys, token_keys, values.to(dtype), mask)
    outputs = experts(slots)
    with autocast_off(values):
        if slot_mask is not None:
            outputs = outputs.masked_fill(~slot_mask[..., None], 0)
        mixed = _attend(token_keys, slot_keys, outputs.to(dtype), slot_mask)
    return mixed if mask is None else mixed.masked_fill(~mask[..., None], 0)
