"""Sampled attention that never builds the attention matrix."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.token_sampling.common import (
    AttentionWeights,
    SampledTokens,
    Sampler,
    gather_tokens,
    significance,
    with_class_token,
)
from narrows.precision import at_least_float32, autocast_off


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
    key, value = F.linear(tokens, key_value_weight, key_value_bias).unflatten(-1, (2, heads, -1)).unbind(2)

    # The class token may always be read, so that no row of attention is empty.
    readable = None if mask is None else torch.cat((torch.ones_like(mask[:, :1]), mask[:, 1:]), 1)
    cls_query = F.linear(tokens[:, 0], query_weight, query_bias).unflatten(-1, (heads, -1))
    key_weight = key_value_weight[:inner].unflatten(0, (heads, -1))
    scores = _scores(cls_query.detach(), key_weight.detach(), tokens.detach(), value.detach(), readable)
    ids, kept = with_class_token(sampler(scores, None if mask is None else mask[:, 1:]), mask)

    query = F.linear(gather_tokens(tokens, ids), query_weight, query_bias).unflatten(-1, (heads, -1))
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if readable is None else readable[:, None, None, :],
        dropout_p=dropout,
    )
    result = F.linear(attended.transpose(1, 2).flatten(2), weights.out, weights.out_bias)
    return SampledTokens(result * kept[..., None], ids, kept)


def _scores(
    cls_query: Float[Tensor, "B H d"],
    key_weight: Float[Tensor, "H d D"],
    tokens: Float[Tensor, "B N D"],
    value: Float[Tensor, "B N H d"],
    readable: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B M"]:
    """Significance of the tokens after the class token.

    The class token's query reads tokens, not keys: q K = (q W) x, where the bias of the keys adds the same to all. That
    is one small product, where keys lie too far apart in memory for any.
    """
    with autocast_off(tokens):
        query, weight, tokens, value = map(at_least_float32, (cls_query, key_weight, tokens, value))
        reader = torch.bmm(query.transpose(0, 1), weight).transpose(0, 1)  # [B, H, D]
        logits = torch.bmm(reader, tokens.transpose(1, 2)) / query.shape[-1] ** 0.5
        norms = torch.linalg.vector_norm(value, dim=-1).transpose(1, 2)
        if readable is None:
            return significance(logits.softmax(-1)[..., 1:], norms[..., 1:])
        attention = logits.masked_fill(~readable[:, None], -torch.inf).softmax(-1)
        return significance(attention[..., 1:], norms[..., 1:], readable[:, 1:])
