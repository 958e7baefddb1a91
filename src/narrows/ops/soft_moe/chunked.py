"""Soft mixture of experts in memory linear in N and in S: nothing of size N x S is ever kept.

Dispatch is plain attention of the slots over the tokens, combine plain attention of the tokens over the slots. Forward
is PyTorch's fused attention. Backward is not PyTorch's, which works on one head of one sample with one CPU thread, and
here there is one head: the queries pass in chunks whose weights are recomputed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.precision import at_least_float32

# Logits recomputed at a time in backward, for the whole batch: small enough for the caches of a CPU.
CHUNK_ELEMENTS = 2**19
SMALLEST_CHUNK = 32


def _chunks(batch: int, num_queries: int, num_keys: int) -> Iterator[slice]:
    rows = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // (batch * num_keys))
    return (slice(start, start + rows) for start in range(0, num_queries, rows))


class _Attention(torch.autograd.Function):
    """softmax(queries keys^T) values, with at least one key of each sample allowed by the mask."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], mask, scale=1.0)[:, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs
        queries, keys, values, mask = ctx.saved_tensors
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        grad_keys, grad_values = (torch.zeros_like(at_least_float32(t)) for t in (keys, values))
        for rows in _chunks(queries.shape[0], queries.shape[1], keys.shape[1]):
            logits = queries[:, rows] @ keys.mT
            if mask is not None:
                logits = logits.masked_fill_(~mask[:, None], torch.finfo(logits.dtype).min)
            weights = logits.softmax(-1)
            grad_values += weights.mT @ grad[:, rows]
            grad_logits = (grad[:, rows] @ values.mT).mul_(weights)
            grad_logits -= weights * grad_logits.sum(-1, keepdim=True)
            grad_queries[:, rows] = grad_logits @ keys
            grad_keys += grad_logits.mT @ queries[:, rows]
        return grad_queries, grad_keys.to(keys.dtype), grad_values.to(values.dtype), None


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    device = values.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
    if mask is not None:  # A sample without any key reads all of them evenly; the caller clears what it gets.
        mask = mask | ~mask.any(-1, keepdim=True)
    result = _Attention.apply(queries.to(dtype), keys.to(dtype), values.to(dtype), mask)
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
    slot_keys = slot_keys.expand(values.shape[0], -1, -1)
    outputs = experts(_attend(slot_keys, token_keys, values, mask))
    if slot_mask is not None:
        outputs = outputs.masked_fill(~slot_mask[..., None], 0)
    mixed = _attend(token_keys, slot_keys, outputs, slot_mask)
    return mixed if mask is None else mixed.masked_fill(~mask[..., None], 0)
