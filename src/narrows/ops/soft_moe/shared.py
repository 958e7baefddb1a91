"""Soft mixture of experts from one matrix of logits, which both softmaxes read."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.precision import autocast_off, compute_dtype


def soft_moe(
    values: Float[Tensor, "B N D"],
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    experts: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Three products of N, S and D in the compute dtype; keeps two N x S matrices for backward."""
    dtype = compute_dtype(values)
    with autocast_off(values):
        values = values.to(dtype)
        logits = token_keys.to(dtype) @ slot_keys.to(dtype).mT
        lowest = torch.finfo(dtype).min
        if mask is not None:  # What masked tokens read of the slots is cleared below.
            logits.masked_fill_(~mask[..., None], lowest)
        weights = logits.softmax(-2)
        slots = weights.mT @ values
        del weights  # Experts run next, and need the memory.
    outputs = experts(slots)
    with autocast_off(values):
        if slot_mask is not None:
            logits.masked_fill_(~slot_mask[:, None], lowest)  # The first softmax keeps its result, not these.
            outputs = outputs.masked_fill(~slot_mask[..., None], 0)
        mixed = logits.softmax(-1) @ outputs.to(dtype)
    return mixed if mask is None else mixed.masked_fill_(~mask[..., None], 0)
