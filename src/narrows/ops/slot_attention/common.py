"""The two softmaxes of slot attention and the mean over the tokens, which every implementation takes as they are."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.precision import accumulation_dtype


def token_weights(
    logits: Float[Tensor, "B K N"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    *,
    normalization: str,
    eps: float,
) -> Float[Tensor, "B K N"]:
    """How much token n reads of slot k: the softmax over the slots, divided by its sum over "tokens" if asked to."""
    attention = softmax_over_slots(logits[:, None], mask, slot_mask)
    if normalization == "tokens":
        attention, _ = mean_weights(attention, mask, eps)
        if slot_mask is not None:  # a masked slot would get eps / (N * eps) = 1 / N of every token
            attention = attention.masked_fill(~slot_mask[:, None, :, None], 0)
    return attention.squeeze(1)


def softmax_over_slots(
    logits: Float[Tensor, "B H K N"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    *,
    joint_heads: bool = False,
) -> Float[Tensor, "B H K N"]:
    """For each token a softmax over the slots, in each head or over all heads together; 0 where either is masked.

    In float32 or better.
    """
    if slot_mask is not None:
        absent = ~slot_mask[:, None, :, None]
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
    dtype = accumulation_dtype(logits)
    if joint_heads:
        attention = logits.flatten(1, 2).softmax(1, dtype=dtype).view(logits.shape)
    else:
        attention = logits.softmax(2, dtype=dtype)
    if slot_mask is not None:
        attention = attention.masked_fill(absent, 0)  # pyright: ignore[reportPossiblyUnboundVariable]
    return attention if mask is None else attention.masked_fill(~mask[:, None, None], 0)


def mean_weights(
    attention: Float[Tensor, "B H K N"], mask: Bool[Tensor, "B N"] | None, eps: float
) -> tuple[Float[Tensor, "B H K N"], Float[Tensor, "B H K 1"]]:
    """`(attention + eps) / total` and the total over the real tokens; all 0 over `eps` where there are none."""
    weights = attention + (eps if mask is None else eps * mask[:, None, None].to(attention.dtype))
    total = weights.sum(-1, keepdim=True)
    if mask is not None:
        total = total.clamp_min(eps)
    return weights / total, total
