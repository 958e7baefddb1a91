r"""The attention of the Perceiver resampler without a normalised copy of the media in every layer.

With media standardised once, $\hat x$, a layer's LayerNorm is its scale $\gamma$ and shift $\beta$ only, which go into
the projection of keys and values:

$$(\hat x \odot \gamma + \beta)\, W^\top = \hat x\, (W \operatorname{diag} \gamma)^\top + W \beta$$

All layers then read, and keep for backward, the same $\hat x$.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from narrows.ops.perceiver_resampler.weights import PerceiverAttentionWeights


def fused(
    latents: Float[Tensor, "B K D"],
    media: Float[Tensor, "B N D"],
    weights: PerceiverAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B K D"]:
    """The reference with LayerNorm of the media folded into their projection, and one fused attention."""
    latents = layer_norm(latents, latents.shape[-1:], weights.latent_scale, weights.latent_shift)
    query = linear(latents, weights.query).unflatten(-1, (heads, -1)).transpose(1, 2)
    of_media = linear(media, weights.key_value * weights.media_scale, weights.key_value @ weights.media_shift)
    key_value = torch.cat((of_media, linear(latents, weights.key_value)), 1)
    key, value = (part.transpose(1, 2) for part in key_value.unflatten(-1, (2, heads, -1)).unbind(2))
    readable = None
    if mask is not None:
        readable = torch.cat((mask, mask.new_ones(latents.shape[:2])), 1)[:, None, None]
    read = scaled_dot_product_attention(query, key, value, attn_mask=readable)
    return linear(read.transpose(1, 2).flatten(2), weights.output)
