"""The fast form: fused attention inside windows, one batched matrix product between them.

With K windows of n tokens, the attention between windows moves whole feature maps: for each head the product of a
`[K, K]` and a `[K, n d]` matrix. A window token that windows share is projected once.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.separable_attention.common import (
    PointwiseWeights,
    SeparableAttentionWeights,
    keys_of_windows,
    several_windows,
)
from narrows.precision import at_least_float32


def fused(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    shortcuts: bool = False,
    mask: Bool[Tensor, "B K n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B K n D"]:
    """What `reference` computes, without the attention matrices of the windows in memory."""
    attended = _inside_windows(windows, weights, heads, mask, dropout)
    n = windows.shape[2]
    maps = attended[:, :, -n:]  # [B, K, n, heads, d]
    if shortcuts:
        maps = maps + windows.unflatten(-1, (heads, -1))
    if weights.pointwise is not None:
        tokens = attended[:, :, 0]
        if shortcuts and weights.window_token is not None:
            tokens = tokens + weights.window_token.unflatten(-1, (heads, -1))
        maps = _between_windows(maps, tokens, weights.pointwise, shortcuts, mask, dropout)
    attended = F.linear(maps.flatten(3), weights.out, weights.out_bias)
    return attended if mask is None else attended.masked_fill(~mask.unsqueeze(-1), 0)


def _inside_windows(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    heads: int,
    mask: Bool[Tensor, "B K n"] | None,
    dropout: float,
) -> Float[Tensor, "B K L heads d"]:
    """Every window attends to itself; the window token first where there is one."""
    batch, num_windows = windows.shape[:2]
    projected = F.linear(windows, weights.qkv, weights.qkv_bias)
    if weights.window_token is not None:
        first = F.linear(weights.window_token, weights.qkv, weights.qkv_bias)
        first = first.to(projected.dtype).expand(batch, num_windows, -1).unsqueeze(2)
        projected = torch.cat((first, projected), 2)
    parts = projected.flatten(0, 1).unflatten(-1, (3, heads, -1)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in parts)
    keys = None
    if mask is not None:
        keys = keys_of_windows(mask, window_token=weights.window_token is not None)
        keys = keys.expand(batch, -1, -1).flatten(0, 1)[:, None, None]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=dropout)
    return attended.transpose(1, 2).unflatten(0, (batch, num_windows))


def _between_windows(
    maps: Float[Tensor, "B K n heads d"],
    tokens: Float[Tensor, "B K heads d"],
    weights: PointwiseWeights,
    shortcuts: bool,
    mask: Bool[Tensor, "B K n"] | None,
    dropout: float,
) -> Float[Tensor, "B K n heads d"]:
    """What each window takes of all windows, by their tokens."""
    num_windows, n, _, d = maps.shape[1:]
    attention = F.dropout(_attention_of_tokens(tokens, weights, mask), dropout)
    values = maps.permute(0, 3, 1, 2, 4).flatten(3)  # [B, heads, K, n d]
    if mask is not None:
        mixed = _masked_mix(attention, values.unflatten(-1, (n, d)), mask)
        if shortcuts:
            mixed = values + mixed * several_windows(mask)[:, None, None, None]
    elif shortcuts:
        attention = attention if num_windows > 1 else attention * 0  # a single window has nobody to take from
        flat = values.flatten(0, 1)
        mixed = torch.baddbmm(flat, attention.flatten(0, 1), flat).view(values.shape)
    else:
        mixed = attention @ values
    return mixed.unflatten(-1, (n, d)).permute(0, 2, 3, 1, 4)


def _attention_of_tokens(
    tokens: Float[Tensor, "B K heads d"], weights: PointwiseWeights, mask: Bool[Tensor, "B K n"] | None
) -> Float[Tensor, "B heads K K"]:
    """Attention between window tokens; nothing for windows of padding alone."""
    scale, shift, query_key, bias, eps = weights
    rows = tokens.flatten(2).unflatten(-1, (-1, len(scale)))
    activated = F.gelu(F.layer_norm(rows, scale.shape, scale, shift, eps)).flatten(2)
    projected = F.linear(activated, query_key, bias)
    query, key = projected.unflatten(-1, (2, tokens.shape[2], -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.any(-1)[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _masked_mix(
    attention: Float[Tensor, "B heads K K"], values: Float[Tensor, "B heads K n d"], mask: Bool[Tensor, "B K n"]
) -> Float[Tensor, "B heads K nd"]:
    """At each of the n places, the mean over the windows that have a real token there, in the shares they attend."""
    real = values * mask[:, None, :, :, None]
    precise = at_least_float32(attention)
    shares = precise @ mask.unsqueeze(1).to(precise.dtype)  # [B, heads, K, n]
    mixed = (attention @ real.flatten(3)).unflatten(-1, values.shape[3:])
    return (mixed / shares.clamp_min(torch.finfo(shares.dtype).tiny).unsqueeze(-1)).to(values.dtype).flatten(3)
