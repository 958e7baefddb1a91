"""The public function of two-way slot attention."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.two_way_slot_attention.absorbed import two_way_slot_attention_absorbed
from narrows.ops.two_way_slot_attention.common import TwoWaySlotAttentionWeights
from narrows.ops.two_way_slot_attention.reference import two_way_slot_attention_reference
from narrows.validation import check_choice, check_mask, check_positive, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(two_way_slot_attention_reference, "every projection written out, in float32"),
        "absorbed": Implementation(
            two_way_slot_attention_absorbed, "projections and the gates' input products moved to the slots' side"
        ),
    }
)


class TwoWaySlotAttentionResult(NamedTuple):
    """Slots and tokens after they have read each other.

    Args:
        slots: `[B, K, S]`.
        tokens: `[B, N, D]`, 0 at masked tokens.
        attention: `[B, K, N]`, with which the slots read in the last iteration: a softmax over the slots, 0 at masked
            tokens.
    """

    slots: Float[Tensor, "B K S"]
    tokens: Float[Tensor, "B N D"]
    attention: Float[Tensor, "B K N"]


def two_way_slot_attention(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: TwoWaySlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    num_iterations: int = 3,
    token_normalization: str = "slots",
    eps: float = 1e-8,
    impl: str = "auto",
) -> TwoWaySlotAttentionResult:
    r"""Let slots read tokens and tokens read slots, in turn.

    With \(R\) rows read by readers \(r\), \(g\) and \(g'\) gated recurrent cells:

    \[ r \leftarrow g(\mathrm{input}=P\, v(R), \mathrm{state}=r), \quad
       r \leftarrow g'(\mathrm{input}=\mathrm{MLP}(r), \mathrm{state}=r) \]

    Slots read with \(P = (A + \epsilon) / \sum_{tokens} (A + \epsilon)\), tokens with \(P = A\), where \(A\) is the
    softmax over the slots of each direction's own logits.

    Args:
        tokens: `[B, N, D]`.
        slots: initial slots, `[B, K, S]`.
        weights: the learned tensors.
        mask: `[B, N]`, True at real tokens.
        num_iterations: T.
        token_normalization: over what the weights sum to 1 with which tokens read slots. "slots": each token reads a
            mean of the slots. "tokens": as upstream, each slot is divided among all tokens, so that what a token reads
            vanishes as 1/N.
        eps: added to attention that is averaged over tokens, positive.
        impl: "auto", "reference" or "absorbed".

    Returns:
        Slots, tokens, and the slots' attention of the last iteration.

    Raises:
        InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
    """
    check_tokens("tokens", tokens, dim=weights.tokens.query.weight.shape[0])
    check_tokens("slots", slots, dim=weights.slots.query.weight.shape[0], layout="[B, K, S]")
    check_mask("mask", mask, tokens.shape[:2])
    if tokens.shape[1] == 0:
        mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
    check_positive(num_iterations=num_iterations)
    check_choice("token_normalization", token_normalization, ("slots", "tokens"))
    if tokens.shape[0] != slots.shape[0]:
        raise InvalidArgument("slots", expected=f"as many samples as tokens, {tokens.shape[0]}", got=slots.shape[0])
    if not eps > 0:
        raise InvalidArgument("eps", expected="a positive number", got=eps)
    run = resolve("two_way_slot_attention", impl, IMPLEMENTATIONS, auto="absorbed")
    return TwoWaySlotAttentionResult(
        *run(
            tokens,
            slots,
            weights,
            mask,
            num_iterations=num_iterations,
            token_normalization=token_normalization,
            eps=eps,
        )
    )
