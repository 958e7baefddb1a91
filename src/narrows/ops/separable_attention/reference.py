"""Separable self-attention as the paper describes it (Li et al. 2022, section 3.2, arXiv 2203.15380)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.precision import at_least_float32, autocast_off


def depthwise_attention(
    query: Float[Tensor, "B K L heads d"],
    key: Float[Tensor, "B K L heads d"],
    value: Float[Tensor, "B K L heads d"],
    keys: Bool[Tensor, "B K L"] | None,
    dropout: float,
) -> Float[Tensor, "B K L heads d"]:
    """Every window, its window token included, attends to itself alone; `keys` says what in it may be read."""
    dtype = query.dtype
    with autocast_off(query):
        query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
        scores = torch.einsum("bkqhd,bknhd->bkhqn", query, key) * query.shape[-1] ** -0.5
        if keys is not None:
            scores = scores.masked_fill(~keys[:, :, None, None], -torch.inf)
        attention = F.dropout(scores.softmax(-1), dropout)
        return torch.einsum("bkhqn,bknhd->bkqhd", attention, value).to(dtype)


def pointwise_attention(
    maps: Float[Tensor, "B K n heads d"],
    query: Float[Tensor, "B K heads d"],
    key: Float[Tensor, "B K heads d"],
    mask: Bool[Tensor, "B K n"] | None,
    shortcut: bool,
    dropout: float,
) -> Float[Tensor, "B K n heads d"]:
    """What each window takes of all windows, place by place: of those that have a real token there."""
    dtype = maps.dtype
    real = maps.new_ones(maps.shape[:3], dtype=torch.bool) if mask is None else mask
    with autocast_off(maps):
        maps, query, key = at_least_float32(maps), at_least_float32(query), at_least_float32(key)
        scores = torch.einsum("bkhd,blhd->bhkl", query, key) * query.shape[-1] ** -0.5
        scores = scores.unsqueeze(-1)  # [B, heads, K, K, 1], the same at each of the n places
        readable = real | ~real.any(1, keepdim=True)  # a place that is padding everywhere needs a softmax too
        scores = scores.masked_fill(~readable[:, None, None], -torch.inf)
        attention = F.dropout(scores.softmax(3), dropout)
        taken = torch.einsum("bhkln,blnhd->bknhd", attention, maps)
        if shortcut:
            several = real.any(-1).sum(-1) > 1  # windows with a real token
            taken = maps + taken * several[:, None, None, None, None]
        return taken.to(dtype)
