"""The public function for text attending to the media it may see."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.dispatch import Implementation, resolve, why_no_cuda
from narrows.ops.media_attention.common import VisibleMedia
from narrows.ops.media_attention.fused import fused
from narrows.ops.media_attention.reference import attention_weights, reference
from narrows.ops.media_attention.segmented import segmented
from narrows.ops.media_attention.varlen import varlen, why_not
from narrows.validation import check_mask, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "all scores, and a mask over them"),
    "fused": Implementation(fused, "fused attention of 512 rows of text at a time, any policy"),
    "segmented": Implementation(segmented, "text grouped by its medium; policies that show a bounded number of media"),
    "varlen": Implementation(
        varlen,
        "one kernel, no text moved; text that reads one medium, bfloat16 and float16 on CUDA",
        why_no_cuda,
    ),
}


def media_attention(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    value: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None = None,
    *,
    mask: Bool[Tensor, "B M *N"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B T H E"]:
    r"""Each text token reads the latents of the media it may see.

    $$o_l = \sum_{m \in V(l)} \sum_n \operatorname{softmax}_{m,n}\!\left(\frac{q_l \cdot k_{mn}}{\sqrt E}\right) v_{mn},
    \qquad V(l) = \{f_l, \dots, \phi_l\}$$

    with $\phi_l$ the last medium before token l and $f_l$ the first it sees: $f_l = \phi_l$ in Flamingo (section 2.3),
    1 where all previous media are seen, and so on: the policies of this package. A token that sees no latent reads
    exactly 0: text before any medium, text whose media were not given (numbers beyond M) or are masked.

    Args:
        query: `[B, T, H, E]`, one row per text token.
        key: `[B, M, N, H, E]`, N latents for each of M media. M may be 0.
        value: as `key`.
        visible: the media that each token sees, in any order, so that a document packed behind another starts from its
            own media. None: every token sees all media.
        mask: `[B, M]` or `[B, M, N]`, True at real media or latents. What stands at the others, NaN included, reaches
            no output and no gradient.
        impl: "auto" takes "fused" where a token may see half of the media or more. Otherwise it takes "varlen" where
            tokens in order see one medium each, in bfloat16 or float16 on CUDA, and "segmented" elsewhere.

    Raises:
        InvalidArgument: shapes that do not belong together, an unknown implementation.
        InvalidType: a mask that is not boolean, numbers that are not integers.
        ImplementationUnavailable: impl="segmented" without a bound on the media that a token sees, impl="varlen" with
            arguments that its kernel does not take.
    """
    _check(query, key, visible, mask)
    if value.shape != key.shape:
        raise InvalidArgument("value", expected=f"the shape of key {tuple(key.shape)}", got=tuple(value.shape))
    if mask is not None:
        padding = ~mask[(...,) + (None,) * (5 - mask.ndim)]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    run = resolve("media_attention", impl, IMPLEMENTATIONS, auto=_choice(query, key, value, visible))
    if key.shape[1] * key.shape[2] == 0:
        return torch.zeros_like(query)
    return run(query, key, value, visible, mask)


def media_attention_weights(
    query: Float[Tensor, "B T H E"],
    key: Float[Tensor, "B M N H E"],
    visible: VisibleMedia | None = None,
    *,
    mask: Bool[Tensor, "B M *N"] | None = None,
) -> Float[Tensor, "B H T M N"]:
    """What `media_attention` never writes down: weights that sum to 1 over all latents, or to 0 where none is seen."""
    _check(query, key, visible, mask)
    if mask is not None:
        key = key.masked_fill(~mask[(...,) + (None,) * (5 - mask.ndim)], 0.0)
    return attention_weights(query, key, visible, mask)


def _choice(query: Tensor, key: Tensor, value: Tensor, visible: VisibleMedia | None) -> str:
    """What "auto" takes."""
    num_media = key.shape[1]
    if visible is None or visible.most is None:
        return "fused"
    # For torch.export, of a number left open.
    if isinstance(num_media, int) and 2 * visible.most - 1 >= num_media:
        return "fused"
    # An exported program holds no kernel of one device, unless it is asked for.
    if torch.compiler.is_exporting() or why_not(query, key, value, visible):
        return "segmented"
    return "varlen"


def _check(query: Tensor, key: Tensor, visible: VisibleMedia | None, mask: Tensor | None) -> None:
    check_tokens("query", query, layout="[B, T, H, E]")
    check_tokens("key", key, layout="[B, M, N, H, E]")
    if (key.shape[0], *key.shape[3:]) != (query.shape[0], *query.shape[2:]):
        raise InvalidArgument(
            "key",
            expected=f"shape [B, M, N, H, E] with B, H, E of query {tuple(query.shape)}",
            got=tuple(key.shape),
        )
    if mask is not None and mask.ndim == 2:
        check_mask("mask", mask, key.shape[:2], layout="[B, M]")
    else:
        check_mask("mask", mask, key.shape[:3], layout="[B, M, N]")
    if visible is None:
        return
    for name, numbers in (("visible.first", visible.first), ("visible.last", visible.last)):
        if numbers.dtype == torch.bool or numbers.is_floating_point():
            raise InvalidType(
                name,
                expected="integers [B, T], numbers of media",
                got=f"dtype {numbers.dtype}",
                hint="From boolean locations: LastMedium().visible(media_locations).",
            )
        if numbers.shape != query.shape[:2]:
            raise InvalidArgument(name, expected=f"shape [B, T] = {tuple(query.shape[:2])}", got=tuple(numbers.shape))
