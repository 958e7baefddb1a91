"""What the implementations of two-way slot attention use unchanged: weights, and what a token reads of each slot."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.slot_attention.common import GRU, MLP, Affine, compete, mean_weights


class Exchange(NamedTuple):
    """One side reads the other and updates itself: R is the width of the readers, C of what they read.

    Args:
        norm_readers: LayerNorm, `[R]`.
        norm_read: LayerNorm of what is read, `[C]`.
        query: `[R, R]`.
        key: `[R, C]`.
        value: `[R, C]`.
        gru: its input is what was read, its state the reader.
        mlp: of the reader after it.
        mlp_gru: its input is what the MLP gives, its state the reader.
    """

    norm_readers: Affine
    norm_read: Affine
    query: Affine
    key: Affine
    value: Affine
    gru: GRU
    mlp: MLP
    mlp_gru: GRU


class TwoWaySlotAttentionWeights(NamedTuple):
    """All learned tensors of two-way slot attention: a LayerNorm of the tokens, and the two exchanges."""

    norm_tokens: Affine
    slots: Exchange
    tokens: Exchange


def token_shares(
    logits: Float[Tensor, "B K N"], mask: Bool[Tensor, "B N"] | None, normalization: str, eps: float
) -> Float[Tensor, "B K N"]:
    """How much token n reads of slot k: the softmax over the slots, or its share of that among all tokens."""
    attention = compete(logits[:, None], mask)
    shares = mean_weights(attention, mask, eps)[0] if normalization == "tokens" else attention
    return shares.squeeze(1)
