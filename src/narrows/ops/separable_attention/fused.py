"""The fast form: fused attention inside windows, one batched matrix product between them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.attention import attention
from narrows.precision import at_least_float32


def depthwise_attention(
    query: Float[Tensor, "B K L heads d"],
    key: Float[Tensor, "B K L heads d"],
    value: Float[Tensor, "B K L heads d"],
    keys: Bool[Tensor, "B K L"] | None,
    dropout: float,
) -> Float[Tensor, "B K L heads d"]:
    """What the reference computes, without the attention matrices in memory."""
    batch, windows = query.shape[:2]
    query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    mask = None if keys is None else keys.flatten(0, 1)[:, None, None]
    attended = attention(query, key, value, mask, dropout=dropout)
    return attended.transpose(1, 2).unflatten(0, (batch, windows))


def pointwise_attention(
    maps: Float[Tensor, "B K n heads d"],
    query: Float[Tensor, "B K heads d"],
    key: Float[Tensor, "B K heads d"],
    mask: Bool[Tensor, "B K n"] | None,
    shortcut: bool,
    dropout: float,
) -> Float[Tensor, "B K n heads d"]:
    """For each head the product of a `[K, K]` and a `[K, n d]` matrix: it moves whole windows at once."""
    num_windows, n, _, d = maps.shape[1:]
    rows, columns = query.transpose(1, 2).flatten(0, 1), key.permute(0, 2, 3, 1).flatten(0, 1)
    # Product and scale in one pass. What is added none of is a number of theirs, since compilers may multiply it by 0.
    scores = torch.baddbmm(rows.detach()[:1, :1, :1], rows, columns, beta=0, alpha=d**-0.5)
    scores = scores.unflatten(0, (query.shape[0], query.shape[2]))
    if mask is not None:  # windows of padding alone give nothing
        scores = scores.masked_fill(~mask.any(-1)[:, None, None], torch.finfo(scores.dtype).min)
    shares = F.dropout(scores.softmax(-1), dropout)
    values = maps.permute(0, 3, 1, 2, 4).flatten(3)  # [B, heads, K, n d]
    if mask is not None:
        taken = _real_windows(shares, values.unflatten(-1, (n, d)), mask)
        if shortcut:
            several = mask.any(-1).sum(-1) > 1  # windows with a real token
            taken = values + taken * several[:, None, None, None]
    elif shortcut:
        shares = shares if num_windows > 1 else shares * 0  # parameters of this step get zeros as gradients
        flat = values.flatten(0, 1)
        taken = torch.baddbmm(flat, shares.flatten(0, 1), flat).unflatten(0, values.shape[:2])
    else:
        taken = shares @ values
    return taken.unflatten(-1, (n, d)).permute(0, 2, 3, 1, 4)


def _real_windows(
    shares: Float[Tensor, "B heads K K"], values: Float[Tensor, "B heads K n d"], mask: Bool[Tensor, "B K n"]
) -> Float[Tensor, "B heads K nd"]:
    """At each of the n places, the mean over the windows that have a real token there, weighted by their shares."""
    real = values * mask[:, None, :, :, None]
    precise = at_least_float32(shares)
    total = precise @ mask.unsqueeze(1).to(precise.dtype)  # [B, heads, K, n]
    taken = (shares @ real.flatten(3)).unflatten(-1, values.shape[3:])
    return (taken / total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)).to(values.dtype).flatten(3)
