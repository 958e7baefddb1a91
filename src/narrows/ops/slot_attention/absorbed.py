"""Slot attention without projecting a token: everything learned on the tokens' side moves to the K slots."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import (
    SlotAttentionWeights,
    absorb_bias,
    cast,
    gru,
    layer_norm,
    mlp,
    token_dtype,
    working_dtype,
)
from narrows.ops.slot_attention.read import read
from narrows.precision import autocast_off


def slot_attention_absorbed(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: SlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None,
    *,
    num_iterations: int,
    heads: int,
    joint_heads: bool,
    eps: float,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B H K N"]]:
    r"""The same numbers from tokens that are normalised once and never projected.

    With \(\hat x\) the token without LayerNorm's \(\gamma, \beta\), and \(w\) weights that sum to 1 over the tokens:

        q . (W_k (gamma x^ + beta) + b_k)           = (gamma W_k^T q) . x^ + q . (W_k beta + b_k)
        sum_n w_n (W_v (gamma x^_n + beta) + b_v)   = W_v (gamma sum_n w_n x^_n) + (W_v beta + b_v)

    The slots live in float32 or float64; the tokens stay in the dtype they came in, or in autocast's.
    """
    low = token_dtype(tokens)
    with autocast_off(tokens):
        dtype = working_dtype(tokens, slots)
        current, weights = slots.to(dtype), cast(weights, dtype)
        any_token = 1
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
            any_token = mask.any(1)[:, None, None, None]
        tokens = F.layer_norm(tokens, tokens.shape[-1:]).to(low)
        gamma = weights.norm_tokens.weight
        key, value = (linear.weight.unflatten(0, (heads, -1)) * gamma for linear in (weights.key, weights.value))
        key_bias, value_bias = (
            absorb_bias(linear, weights.norm_tokens).unflatten(0, (heads, -1))
            for linear in (weights.key, weights.value)
        )
        key = torch.cat([key, key_bias[..., None]], -1) * key.shape[1] ** -0.5  # [H, E, D + 1]
        for _ in range(num_iterations):
            queries = F.linear(layer_norm(current, weights.norm_slots), *weights.query).unflatten(-1, (heads, -1))
            readers = torch.einsum("bkhe,hed->bhkd", queries, key)
            mixed, attention = read(readers[..., :-1], readers[..., -1], tokens, mask, joint_heads=joint_heads, eps=eps)
            updates = torch.einsum("bhkd,hed->bkhe", mixed, value) + value_bias * any_token
            updates = updates.flatten(2)
            if weights.output is not None:
                updates = F.linear(updates, *weights.output)
            current = gru(updates, current, weights.gru)
            current = current + mlp(current, weights.mlp)
        return current.to(slots.dtype), attention.to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]
