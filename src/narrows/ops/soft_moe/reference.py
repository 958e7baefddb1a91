"""Soft mixture of experts as the paper writes it: the specification the other forms are held to."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.precision import at_least_float32, autocast_off, compute_dtype


def _masked_softmax(logits: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Softmax over the entries that `mask` allows, 0 elsewhere; all 0 where it allows none."""
    if mask is None:
        return logits.softmax(dim)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim).masked_fill(~mask, 0)


def dispatch_weights(
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N S"]:
    """How much of each token a slot reads: softmax over the tokens (Algorithm 1, `D`), in float32 or better.

    The column of a slot sums to 1, or is 0 where the slot takes no part or the sample has no token.
    """
    with autocast_off(token_keys):
        logits = at_least_float32(token_keys) @ at_least_float32(slot_keys).mT
        weights = _masked_softmax(logits, None if mask is None else mask[..., None], dim=-2)
        return weights if slot_mask is None else weights.masked_fill(~slot_mask[:, None], 0)


def combine_weights(
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N S"]:
    """How much of each slot a token reads: softmax over all slots (Algorithm 1, `C`), in float32 or better.

    The row of a token sums to 1, or is 0 where the token is masked.
    """
    with autocast_off(token_keys):
        logits = at_least_float32(token_keys) @ at_least_float32(slot_keys).mT
        weights = _masked_softmax(logits, None if slot_mask is None else slot_mask[:, None], dim=-1)
        return weights if mask is None else weights.masked_fill(~mask[..., None], 0)


def soft_moe(
    values: Float[Tensor, "B N D"],
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    experts: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Algorithm 1: tokens to slots, slots through their experts, slots back to tokens."""
    dispatch = dispatch_weights(token_keys, slot_keys, mask, slot_mask)
    combine = combine_weights(token_keys, slot_keys, mask, slot_mask)
    with autocast_off(values):
        slots = torch.einsum("bns,bnd->bsd", dispatch, at_least_float32(values))
    outputs = experts(slots.to(values.dtype))
    dtype = compute_dtype(values)
    with autocast_off(values):
        return torch.einsum("bns,bsd->bnd", combine, at_least_float32(outputs)).to(dtype)
