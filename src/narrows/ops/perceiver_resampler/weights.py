"""The parameters of one attention of the Perceiver resampler."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class PerceiverAttentionWeights(NamedTuple):
    """Parameters of one attention, I = heads * head_dim its inner width.

    Args:
        media_scale, media_shift: `[D]`, LayerNorm of the media.
        latent_scale, latent_shift: `[D]`, LayerNorm of the latents.
        query: `[I, D]`.
        key_value: `[2 I, D]`, the rows of the keys before those of the values.
        output: `[D, I]`.
    """

    media_scale: Float[Tensor, " D"]
    media_shift: Float[Tensor, " D"]
    latent_scale: Float[Tensor, " D"]
    latent_shift: Float[Tensor, " D"]
    query: Float[Tensor, "I D"]
    key_value: Float[Tensor, "J D"]
    output: Float[Tensor, "D I"]
