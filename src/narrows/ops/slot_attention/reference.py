"""Slot attention as the paper writes it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.slot_attention.common import mean_weights, softmax_over_slots
from narrows.precision import accumulation_dtype, autocast_off


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
    """The formula in float32 or better."""
    with autocast_off(keys):
        wide = accumulation_dtype(queries, keys, values)
        logits = queries.to(wide) @ keys.to(wide).mT
        if bias is not None:
            logits = logits + bias[..., None]
        attention = softmax_over_slots(logits, mask, slot_mask, joint_heads=joint_heads)
        weights, _ = mean_weights(attention, mask, eps)
        updates = weights @ values.to(wide)
        return updates if dtype is None else updates.to(dtype), attention
