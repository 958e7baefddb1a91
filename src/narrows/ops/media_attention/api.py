"""The public function for text attending to the media it may see."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.media_attention.fused import fused
from narrows.ops.media_attention.reference import attention_weights, reference
from narrows.ops.media_attention.segmented import segmented
from narrows.validation import check_choice, check_mask, check_tokens

ATTEND = ("last", "previous")

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "all scores, and a mask over them"),
    "fused": Implementation(fused, "fused attention under a dense mask, for either policy"),
    "segmented": Implementation(segmented, "text grouped by its medium; attend='last' only"),
}


def media_attention(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    text_time: Int[Tensor, "B T"] | None = None,
    *,
    mask: Bool[Tensor, "B M N"] | None = None,
    attend: str = "last",
    impl: str = "auto",
) -> Float[Tensor, "B T H E"]:
    r"""Each text token reads the latents of the media it may see.

    $$o_l = \sum_{m \in V(l)} \sum_n \operatorname{softmax}_{m,n}\!\left(\frac{q_l \cdot k_{mn}}{\sqrt E}\right) v_{mn},
    \qquad V(l) = \{\phi(l)\} \text{ or } \{1, \dots, \phi(l)\}$$

    with $\phi(l)$ the last medium before token l (Flamingo, section 2.3). A token that sees no latent reads exactly 0:
    text before any medium, text after a medium that was not given (`text_time` beyond M, attend="last"), text whose
    media are masked.

    Args:
        query: `[B, T, H, E]`, one row per text token.
        key: `[B, M, N, H, E]`, N latents for each of M media. M may be 0.
        value: as `key`.
        text_time: `[B, T]` integers, $\phi(l)$: 1 for the first medium, 0 for none. In any order, so that a document
            packed behind another starts from its own media. None: every token sees all media.
        mask: `[B, M, N]`, True at real latents. What stands at the others, NaN included, reaches no output and no
            gradient.
        attend: "last", the medium `text_time` alone, or "previous", every medium up to it.
        impl: "auto" takes "segmented" for attend="last" with times and several media, "fused" otherwise.

    Raises:
        InvalidArgument: shapes that do not belong together, an unknown policy or implementation.
        InvalidType: a mask that is not boolean, times that are not integers.
        ImplementationUnavailable: impl="segmented" with attend="previous" or without times.
    """
    check_choice("attend", attend, ATTEND)
    _check(query, key, text_time, mask)
    if value.shape != key.shape:
        raise InvalidArgument("value", expected=f"the shape of key {tuple(key.shape)}", got=tuple(value.shape))
    if mask is not None:
        padding = ~mask[..., None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    auto = "segmented" if attend == "last" and text_time is not None and key.shape[1] > 1 else "fused"
    run = resolve("media_attention", impl, IMPLEMENTATIONS, auto=auto)
    if key.shape[1] * key.shape[2] == 0:
        return torch.zeros_like(query)
    return run(query, key, value, text_time, mask, attend=attend)


def media_attention_weights(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    text_time: Int[Tensor, "B T"] | None = None,
    *,
    mask: Bool[Tensor, "B M N"] | None = None,
    attend: str = "last",
) -> Float[Tensor, "B H T M N"]:
    """What `media_attention` never writes down: weights that sum to 1 over all latents, or to 0 where none is seen."""
    check_choice("attend", attend, ATTEND)
    _check(query, key, text_time, mask)
    if mask is not None:
        key = key.masked_fill(~mask[..., None, None], 0.0)
    return attention_weights(query, key, text_time, mask, attend=attend)


def _check(query: Tensor, key: Tensor, text_time: Tensor | None, mask: Tensor | None) -> None:
    check_tokens("query", query, layout="[B, T, H, E]")
    check_tokens("key", key, layout="[B, M, N, H, E]")
    if (key.shape[0], *key.shape[3:]) != (query.shape[0], *query.shape[2:]):
        raise InvalidArgument(
            "key",
            expected=f"shape [B, M, N, H, E] with B, H, E of query {tuple(query.shape)}",
            got=tuple(key.shape),
        )
    check_mask("mask", mask, key.shape[:3], layout="[B, M, N]")
    if text_time is None:
        return
    if text_time.dtype == torch.bool or text_time.is_floating_point():
        raise InvalidType(
            "text_time",
            expected="integers [B, T], how many media stand before each text token",
            got=f"dtype {text_time.dtype}",
            hint="From boolean locations: media_locations.cumsum(-1).",
        )
    if text_time.shape != query.shape[:2]:
        raise InvalidArgument(
            "text_time", expected=f"shape [B, T] = {tuple(query.shape[:2])}", got=tuple(text_time.shape)
        )
