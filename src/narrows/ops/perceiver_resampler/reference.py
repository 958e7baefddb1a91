"""The attention of the Perceiver resampler as the paper writes it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from narrows.ops.perceiver_resampler.weights import PerceiverAttentionWeights
from narrows.precision import at_least_float32, autocast_off


def attention_weights(
    latents: Float[Tensor, "B K D"],
    media: Float[Tensor, "B N D"],
    weights: PerceiverAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B N"] | None,
) -> tuple[Float[Tensor, "B H K S"], Float[Tensor, "B H S E"]]:
    """What each latent reads of the N media tokens and then of the K latents, S = N + K, and the values there."""
    with autocast_off(latents):
        latents, media = at_least_float32(latents), at_least_float32(media)
        weights = PerceiverAttentionWeights(*map(at_least_float32, weights))
        media = media * weights.media_scale + weights.media_shift  # LayerNorm: media come standardised
        latents = layer_norm(latents, latents.shape[-1:], weights.latent_scale, weights.latent_shift)

        query = linear(latents, weights.query).unflatten(-1, (heads, -1)).transpose(1, 2)
        key_value = linear(torch.cat((media, latents), 1), weights.key_value)
        key, value = key_value.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)

        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            readable = torch.cat((mask, mask.new_ones(latents.shape[:2])), 1)
            scores = scores.masked_fill(~readable[:, None, None], -float("inf"))
        return scores.softmax(-1), value


def reference(
    latents: Float[Tensor, "B K D"],
    media: Float[Tensor, "B N D"],
    weights: PerceiverAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B K D"]:
    """Latents attend to media and to themselves, in float32 or better; the specification of `perceiver_attention`."""
    with autocast_off(latents):
        shares, value = attention_weights(latents, media, weights, heads=heads, mask=mask)
        read = (shares @ value).transpose(1, 2).flatten(2)
        return linear(read, at_least_float32(weights.output)).to(latents.dtype)
