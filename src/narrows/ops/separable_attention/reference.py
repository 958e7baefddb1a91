"""Depthwise separable self-attention as the paper describes it (Li et al. 2022, section 3.2, arXiv 2203.15380)."""

from typing import Any

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
from narrows.precision import at_least_float32, autocast_off


def reference(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    shortcuts: bool = False,
    mask: Bool[Tensor, "B K n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B K n D"]:
    """`textbook` in float32 or better; the result has the dtype of `windows`."""
    pointwise = weights.pointwise
    precise = SeparableAttentionWeights(*(_precise(part) for part in weights))._replace(
        pointwise=None if pointwise is None else PointwiseWeights(*(_precise(part) for part in pointwise))
    )
    with autocast_off(windows):
        attended = textbook(
            at_least_float32(windows), precise, heads=heads, shortcuts=shortcuts, mask=mask, dropout=dropout
        )
        return attended.to(windows.dtype)


def textbook(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    shortcuts: bool = False,
    mask: Bool[Tensor, "B K n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B K n D"]:
    """Attention inside the windows, then between them, in the dtype of its arguments."""
    batch, num_windows, n, _ = windows.shape
    mask = windows.new_ones(batch, num_windows, n, dtype=torch.bool) if mask is None else mask
    tokens = windows
    if weights.window_token is not None:
        first = weights.window_token.expand(batch, num_windows, -1).unsqueeze(2)
        tokens = torch.cat((first, windows), 2)

    # Depthwise: every window, its token included, attends to itself alone.
    projected = tokens @ weights.qkv.T + (0 if weights.qkv_bias is None else weights.qkv_bias)
    query, key, value = projected.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5)  # [B, heads, K, L, d]
    keys = keys_of_windows(mask, window_token=weights.window_token is not None)
    attended = F.dropout(_scores(query, key).masked_fill(~keys[:, None, :, None], -torch.inf).softmax(-1), dropout)
    attended = attended @ value
    if shortcuts:
        attended = attended + tokens.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)

    # Pointwise: the window tokens say how much of each window's whole feature map a window takes.
    maps = attended[..., -n:, :]
    if weights.pointwise is not None:
        mixed = _between_windows(attended[..., 0, :], maps, weights.pointwise, mask, dropout)
        maps = maps + mixed * several_windows(mask)[:, None, None, None, None] if shortcuts else mixed

    attended = maps.permute(0, 2, 3, 1, 4).flatten(3) @ weights.out.T + weights.out_bias
    return attended * mask.unsqueeze(-1)


def _between_windows(
    tokens: Float[Tensor, "B heads K d"],
    maps: Float[Tensor, "B heads K n d"],
    weights: PointwiseWeights,
    mask: Bool[Tensor, "B K n"],
    dropout: float,
) -> Float[Tensor, "B heads K n d"]:
    """What each window takes of all windows, place by place; a place takes nothing where a window has padding."""
    scale, shift, query_key, bias, eps = weights
    rows = tokens.transpose(1, 2)  # [B, K, heads, d]
    rows = rows.flatten(2).unflatten(-1, (-1, len(scale)))  # the width that is normalised last: a head, or all of them
    activated = F.gelu(F.layer_norm(rows, scale.shape, scale, shift, eps)).flatten(2)
    query, key = (activated @ query_key.T + bias).unflatten(-1, (2, tokens.shape[1], -1)).permute(2, 0, 3, 1, 4)
    scores = _scores(query, key).unsqueeze(-1)  # [B, heads, K, K, 1], the same at each of the n places
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    attention = F.dropout(scores.softmax(3), dropout)
    return torch.einsum("bhkln,bhlnd->bhknd", attention, maps)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def _precise(part: Any) -> Any:
    return at_least_float32(part) if isinstance(part, Tensor) else part
