"""Depthwise separable self-attention as the paper describes it (Li et al. 2022, section 3.2, arXiv 2203.15380)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.precision import at_least_float32, autocast_off
from narrows.ops.separable_attention.common import PointwiseWeights, SeparableAttentionWeights


def reference(
    windows: Float[Tensor, "B K n D"], weights: SeparableAttentionWeights, *, heads: int, dropout: float = 0.0
) -> Float[Tensor, "B K n D"]:
    """`textbook` in float32 or better; the result has the dtype of `windows`."""
    pointwise = weights.pointwise
    precise = weights._replace(
        pointwise=None if pointwise is None else PointwiseWeights(*map(at_least_float32, pointwise)),
        **{name: at_least_float32(getattr(weights, name)) for name in ("qkv", "window_token", "out", "out_bias")},
    )
    with autocast_off(windows):
        return textbook(at_least_float32(windows), precise, heads=heads, dropout=dropout).to(windows.dtype)


def textbook(
    windows: Float[Tensor, "B K n D"], weights: SeparableAttentionWeights, *, heads: int, dropout: float = 0.0
) -> Float[Tensor, "B K n D"]:
    """Attention inside the windows, then between them, in the dtype of its arguments."""
    token = weights.window_token.expand(*windows.shape[:2], 1, -1)
    projected = torch.cat((token, windows), 2) @ weights.qkv.T

    # Depthwise: every window, its token included, attends to itself alone.
    query, key, value = projected.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5)  # [B, heads, K, 1 + n, d]
    attended = _attention(query, key, dropout) @ value

    # Pointwise: the window tokens say how much of each window's whole feature map a window takes.
    maps = attended[..., 1:, :]
    if weights.pointwise is not None:
        tokens = attended[..., 0, :]  # [B, heads, K, d]
        scale, shift, query_key, bias = weights.pointwise
        activated = F.gelu(F.layer_norm(tokens, tokens.shape[-1:], scale, shift))
        projected = activated.transpose(1, 2).flatten(2) @ query_key.T + bias
        query, key = projected.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        maps = torch.einsum("bhkl,bhlnd->bhknd", _attention(query, key, dropout), maps)

    return maps.permute(0, 2, 3, 1, 4).flatten(3) @ weights.out.T + weights.out_bias


def _attention(query: Tensor, key: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)), `dropout` of its entries dropped."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return F.dropout(scores.softmax(-1), dropout)
