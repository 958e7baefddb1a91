"""The fast form: fused attention inside windows, one batched matrix product between them.

With K windows of n tokens, the attention between windows moves whole feature maps: for each head the product of a
`[K, K]` and a `[K, n d]` matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.linear import linear
from narrows.ops.separable_attention.common import PointwiseWeights, SeparableAttentionWeights


def fused(
    windows: Float[Tensor, "B K n D"], weights: SeparableAttentionWeights, *, heads: int, dropout: float = 0.0
) -> Float[Tensor, "B K n D"]:
    """What `reference` computes, without the attention matrices of the windows in memory."""
    batch, num_windows, _, dim = windows.shape
    tokens = torch.cat((weights.window_token.to(windows.dtype).expand(batch, num_windows, 1, dim), windows), 2)
    projected = linear(tokens.flatten(0, 1), weights.qkv)
    query, key, value = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    attended = attended.unflatten(0, (batch, num_windows))  # [B, K, heads, 1 + n, d]
    maps = attended[..., 1:, :]
    if weights.pointwise is not None:
        maps = _mix_windows(maps, attended[..., 0, :], weights.pointwise, dropout)
    return linear(maps.transpose(2, 3).flatten(3), weights.out, weights.out_bias)


def _mix_windows(
    maps: Float[Tensor, "B K heads n d"],
    tokens: Float[Tensor, "B K heads d"],
    weights: PointwiseWeights,
    dropout: float,
) -> Float[Tensor, "B K heads n d"]:
    heads, n, d = maps.shape[2:]
    activated = F.gelu(F.layer_norm(tokens, (d,), weights.norm_weight, weights.norm_bias))
    projected = F.linear(activated.flatten(2), weights.query_key, weights.query_key_bias)
    query, key = projected.unflatten(-1, (2, heads, d)).permute(2, 0, 3, 1, 4)  # [B, heads, K, d]
    attention = F.dropout((query @ key.transpose(-1, -2) * d**-0.5).softmax(-1), dropout)
    mixed = attention @ maps.transpose(1, 2).flatten(3)
    return mixed.unflatten(-1, (n, d)).transpose(1, 2)
