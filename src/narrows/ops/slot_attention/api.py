"""The public function of slot attention."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.slot_attention.absorbed import slot_attention_absorbed
from narrows.ops.slot_attention.common import SlotAttentionWeights, token_dtype
from narrows.ops.slot_attention.reference import slot_attention_reference
from narrows.validation import check_mask, check_positive, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(slot_attention_reference, "Algorithm 1 of the paper, in float32 or better"),
        "absorbed": Implementation(slot_attention_absorbed, "keys, values and LayerNorm moved to the slots' side"),
    }
)


class SlotAttentionResult(NamedTuple):
    """Slots and what they read.

    Args:
        slots: `[B, K, S]`.
        attention: `[B, H, K, N]`, the last iteration's softmax over the slots, 0 at masked tokens.
    """

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B H K N"]


def slot_attention(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: SlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    num_iterations: int = 3,
    heads: int = 1,
    joint_heads: bool = False,
    eps: float = 1e-8,
    impl: str = "auto",
) -> SlotAttentionResult:
    r"""Let `slots` compete for `tokens` for a number of iterations.

    \[ A = \mathrm{softmax}_{slots}(E^{-1/2} q(s) k(x)^T), \quad
       u_k = \sum_n \frac{A_{kn} + \epsilon}{\sum_m A_{km} + \epsilon} v(x_n), \quad
       s \leftarrow h + \mathrm{MLP}(h), \; h = \mathrm{GRU}(u, s) \]

    Args:
        tokens: `[B, N, D]`.
        slots: initial slots, `[B, K, S]`. Results have their dtype.
        weights: the learned tensors.
        mask: `[B, N]`, True at real tokens.
        num_iterations: T.
        heads: H, into which the projections are split.
        joint_heads: one softmax over slots and heads together, rather than one per head.
        eps: added to the attention before it is averaged over tokens, positive.
        impl: "auto", "reference" or "absorbed".

    Returns:
        The slots and the last iteration's attention. A sample without any real token has read zeros.

    Raises:
        InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.

    Locatello et al., Object-Centric Learning with Slot Attention, NeurIPS 2020, https://arxiv.org/abs/2006.15055.
    """
    check_tokens("tokens", tokens, dim=weights.key.weight.shape[1])
    check_tokens("slots", slots, dim=weights.query.weight.shape[1], layout="[B, K, S]")
    check_mask("mask", mask, tokens.shape[:2])
    if tokens.shape[1] == 0:
        mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
    check_positive(num_iterations=num_iterations, heads=heads)
    if tokens.shape[0] != slots.shape[0]:
        raise InvalidArgument("slots", expected=f"as many samples as tokens, {tokens.shape[0]}", got=slots.shape[0])
    if weights.query.weight.shape[0] % heads:
        raise InvalidArgument("heads", expected=f"a divisor of {weights.query.weight.shape[0]}", got=heads)
    if not eps > 0:
        raise InvalidArgument("eps", expected="a positive number", got=eps)
    # The absorbed form moves T*K*H maps of width D to the slots' side for every two it saves the tokens: measured, it
    # stops paying there. Below float32 the reference would compute in float32, at several times the cost.
    pays = num_iterations * slots.shape[1] * heads <= tokens.shape[-1]
    low_precision = token_dtype(tokens).itemsize < 4
    run = resolve("slot_attention", impl, IMPLEMENTATIONS, auto="absorbed" if pays or low_precision else "reference")
    return SlotAttentionResult(
        *run(tokens, slots, weights, mask, num_iterations=num_iterations, heads=heads, joint_heads=joint_heads, eps=eps)
    )
