"""The public functions for the attention of the Perceiver resampler."""

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.perceiver_resampler.fused import fused
from narrows.ops.perceiver_resampler.reference import attention_weights, reference
from narrows.ops.perceiver_resampler.weights import PerceiverAttentionWeights
from narrows.validation import check_mask, check_positive, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "the paper's form: media normalised in every layer, all scores"),
    "fused": Implementation(fused, "LayerNorm of the media folded into their projection, fused attention"),
}


def perceiver_attention(
    latents: Float[Tensor, "B K D"],
    media: Float[Tensor, "B N D"],
    weights: PerceiverAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B N"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B K D"]:
    r"""Latents read the media tokens and each other: `attn(q=x, kv=concat[x_f, x])` of Flamingo, figure 5.

    $$\operatorname{softmax}\!\left(\frac{Q(x)\, K([x_f; x])^\top}{\sqrt E}\right) V([x_f; x])\, W_o$$

    with x and $x_f$ normalised, each by its own LayerNorm.

    Args:
        latents: x, `[B, K, D]`.
        media: $x_f$, `[B, N, D]`, every token standardised (mean 0, variance 1) and finite. The statistics are the same
            in all layers of a resampler, so the caller takes them once.
        weights: the parameters, the scale and shift of both LayerNorms among them.
        heads: number of heads.
        mask: `[B, N]`, True at real tokens. Latents of a sample without any read only each other.
        impl: "auto" takes "fused".

    Raises:
        InvalidArgument: shapes that do not belong together, an unknown implementation.
        InvalidType: a mask that is not boolean.
    """
    _check(latents, media, weights, heads, mask)
    return resolve("perceiver_attention", impl, IMPLEMENTATIONS, auto="fused")(
        latents, media, weights, heads=heads, mask=mask
    )


def perceiver_attention_weights(
    latents: Float[Tensor, "B K D"],
    media: Float[Tensor, "B N D"],
    weights: PerceiverAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B H K N"]:
    """The share of each media token in what a latent reads. What a row lacks to 1 the latents read of each other."""
    _check(latents, media, weights, heads, mask)
    shares, _ = attention_weights(latents, media, weights, heads=heads, mask=mask)
    return shares[..., : media.shape[1]]


def _check(latents: Tensor, media: Tensor, weights: PerceiverAttentionWeights, heads: int, mask: Tensor | None) -> None:
    inner, dim = weights.query.shape
    check_positive(heads=heads)
    if inner % heads != 0:
        raise InvalidArgument("heads", expected=f"a divisor of the inner width {inner}", got=heads)
    check_tokens("latents", latents, dim=dim, layout="[B, K, D]")
    check_tokens("media", media, dim=dim)
    if media.shape[0] != latents.shape[0]:
        raise InvalidArgument("media", expected=f"the batch of latents, {latents.shape[0]}", got=tuple(media.shape))
    check_mask("mask", mask, media.shape[:2])
