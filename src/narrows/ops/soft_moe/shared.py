"""Soft mixture of experts from one matrix of logits, which both softmaxes read."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def soft_moe(
    values: Float[Tensor, "B N D"],
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    experts: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Three products of N, S and D, in the dtype of the inputs; keeps two N x S matrices for backward."""
    logits = token_keys @ slot_keys.mT
    lowest = torch.finfo(logits.dtype).min
    to_slots = logits if mask is None else logits.masked_fill(~mask[..., None], lowest)
    outputs = experts(weights(to_slots, -2).mT @ values)
    if slot_mask is not None:
        logits = logits.masked_fill(~slot_mask[:, None], lowest)
        outputs = outputs.masked_fill(~slot_mask[..., None], 0)
    mixed = weights(logits, -1) @ outputs
    return mixed if mask is None else mixed.masked_fill(~mask[..., None], 0)


def weights(logits: Float[Tensor, "B N S"], dim: int) -> Float[Tensor, "B N S"]:
    """Softmax; on a CPU with 0 for what is below the normal numbers.

    Logits of "rms" keys lie so far apart that a good part of the weights is, and a CPU multiplies with such numbers a
    hundred times slower.
    """
    if logits.device.type != "cpu":
        return logits.softmax(dim)
    result = _Weights.apply(logits, dim)
    assert isinstance(result, Tensor)
    return result


class _Weights(torch.autograd.Function):
    """Keeps for backward what it returns, and nothing else."""

    @staticmethod
    def forward(logits: Tensor, dim: int) -> Tensor:
        result = logits.softmax(dim)
        return F.threshold(result, torch.finfo(result.dtype).tiny, 0.0, inplace=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), (result,) = grad_outputs, ctx.saved_tensors
        product = grad * result
        return product - result * product.sum(ctx.dim, keepdim=True), None
