"""Text attending to media through one fused attention under a dense mask: any policy, T x (M N) booleans."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from narrows.ops.media_attention.common import visible_latents


def fused(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    text_time: Int[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B M N"] | None,
    *,
    attend: str,
) -> Float[Tensor, "B T H E"]:
    """The reference through `scaled_dot_product_attention`, which keeps no scores."""
    query = query.transpose(1, 2)
    keys, values = (latents.flatten(1, 2).transpose(1, 2) for latents in (key, value))
    if text_time is None and mask is None:
        return scaled_dot_product_attention(query, keys, values).transpose(1, 2)
    visible = visible_latents(key, text_time, mask, attend=attend).flatten(2)
    something = visible.any(-1, keepdim=True)
    # A row without any visible latent attends to all, finite, and is emptied after it.
    read = scaled_dot_product_attention(query, keys, values, attn_mask=(visible | ~something)[:, None])
    return torch.where(something[..., None], read.transpose(1, 2), 0.0)
