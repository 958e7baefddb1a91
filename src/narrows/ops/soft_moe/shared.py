"""Soft mixture of experts from one matrix of logits, which both softmaxes read."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
    outputs = experts(to_slots.softmax(-2).mT @ values)
    if slot_mask is not None:
        logits = logits.masked_fill(~slot_mask[:, None], lowest)
        outputs = outputs.masked_fill(~slot_mask[..., None], 0)
    mixed = logits.softmax(-1) @ outputs
    return mixed if mask is None else mixed.masked_fill(~mask[..., None], 0)
