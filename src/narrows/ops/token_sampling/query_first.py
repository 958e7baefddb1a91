"""Sampled attention that never builds the attention matrix."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.linear import linear
from narrows.ops.precision import at_least_float32, autocast_off
from narrows.ops.token_sampling.common import (
    AttentionWeights,
    SampledTokens,
    Sampler,
    gather_tokens,
    significance,
    with_class_token,
)


def sampled_attention(
    tokens: Float[Tensor, "B N D"],
    weights: AttentionWeights,
    heads: int,
    sampler: Sampler,
    mask: Bool[Tensor, "B N"] | None,
    dropout: float,
) -> SampledTokens:
    """The class token's query first, for the scores; then queries of the sampled tokens alone, over all keys.

    Projects keys and values of N tokens and queries of K + 1, attends (K + 1) x N, fused. What the reference selects
    after the fact is never computed.
    """
    if mask is not None:
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
    inner = weights.qkv.shape[0] // 3
    query_weight, key_value_weight = weights.qkv.split((inner, 2 * inner))
    query_bias, key_value_bias = (
        (None, None) if weights.qkv_bias is None else weights.qkv_bias.split((inner, 2 * inner))
    )
    key, value = linear(tokens, key_value_weight, key_value_bias).unflatten(-1, (2, heads, -1)).unbind(2)

    # The class token may always be read, so that no row of attention is empty.
    readable = None if mask is None else torch.cat((torch.ones_like(mask[:, :1]), mask[:, 1:]), 1)
    cls_query = F.linear(tokens[:, 0], query_weight, query_bias).unflatten(-1, (heads, -1))
    scores = _scores(cls_query.detach(), key.detach(), value.detach(), readable)
    ids, kept = with_class_token(sampler(scores, None if mask is None else mask[:, 1:]), mask)

    query = linear(gather_tokens(tokens, ids), query_weight, query_bias).unflatten(-1, (heads, -1))
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if readable is None else readable[:, None, None, :],
        dropout_p=dropout,
    )
    result = linear(attended.transpose(1, 2).flatten(2), weights.out, weights.out_bias)
    return SampledTokens(result * kept[..., None], ids, kept)


def _scores(cls_query: Tensor, key: Tensor, value: Tensor, readable: Tensor | None) -> Tensor:
    """Significance `[B, N - 1]` from the class token's query `[B, H, d]`, keys and values `[B, N, H, d]`."""
    with autocast_off(key):
        query, key, value = at_least_float32(cls_query), at_least_float32(key), at_least_float32(value)
        # One row of attention: a sum of products reads the keys once, where a batched product would first copy them.
        logits = (key * query[:, None]).sum(-1).transpose(1, 2) / query.shape[-1] ** 0.5
        norms = torch.linalg.vector_norm(value, dim=-1).transpose(1, 2)
        if readable is None:
            return significance(logits.softmax(-1)[..., 1:], norms[..., 1:])
        attention = logits.masked_fill(~readable[:, None], -torch.inf).softmax(-1)
        return significance(attention[..., 1:], norms[..., 1:], readable[:, 1:])
