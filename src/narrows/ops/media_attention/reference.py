"""Text attending to media as the paper writes it: all scores, and a mask over them."""

from jaxtyping import Bool, Float
from torch import Tensor, einsum

from narrows.ops.media_attention.common import VisibleMedia, visible_latents
from narrows.precision import at_least_float32, autocast_off


def attention_weights(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B H T M N"]:
    """The share of each latent of each medium in what a text token reads; all 0 for a token that sees none."""
    with autocast_off(query):
        query, key = at_least_float32(query), at_least_float32(key)
        scores = einsum("bthe,bmnhe->bhtmn", query, key) * query.shape[-1] ** -0.5
        seen = visible_latents(key, visible, mask)[:, None]
        # A row without any visible latent takes a softmax over all of them, finite, and is emptied after it.
        nothing = ~seen.flatten(3).any(-1)[..., None, None]
        scores = scores.masked_fill(~seen & ~nothing, -float("inf"))
        weights = scores.flatten(3).softmax(-1).view_as(scores)
        return weights.masked_fill(nothing, 0.0)


def reference(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None,
    mask: Bool[Tensor, "B M *N"] | None,
) -> Float[Tensor, "B T H E"]:
    """Softmax attention over the visible latents, in float32 or better; the specification of `media_attention`."""
    with autocast_off(query):
        weights = attention_weights(query, key, visible, mask)
        return einsum("bhtmn,bmnhe->bthe", weights, at_least_float32(value)).to(query.dtype)
