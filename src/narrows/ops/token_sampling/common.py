"""What the implementations of token sampling share: the records they return and the score they sample by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from narrows.precision import at_least_float32, autocast_off

# Keeps logarithms and divisions of Gumbel sampling finite; the value the package vit-pytorch uses.
GUMBEL_EPSILON = 1e-6


class TokenSample(NamedTuple):
    """Which tokens are kept, in K slots whatever their number.

    Args:
        ids: `[B, K]`, positions of the kept tokens in ascending (raster) order, each once; 0 in the slots left over.
        mask: `[B, K]`, True at the slots that hold a token; they come first.
    """

    ids: Int[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]


class SampledTokens(NamedTuple):
    """Tokens that were kept, and where they stood.

    Args:
        tokens: `[B, K, D]`, 0 in the slots left over.
        ids: `[B, K]`, the position each token had; 0 in the slots left over.
        mask: `[B, K]`, True at the slots that hold a token; they come first.
    """

    tokens: Float[Tensor, "B K D"]
    ids: Int[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]


# Scores [B, N] and mask [B, N] of the tokens after the class token to the tokens that are kept.
Sampler = Callable[[Tensor, Tensor | None], TokenSample]

# Positions [B, M] to the queries [B, M, H, d] of the tokens there.
Queries = Callable[[Tensor], Tensor]


def significance(
    cls_attention: Float[Tensor, "B H N"], value_norms: Float[Tensor, "B H N"], mask: Bool[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N"]:
    r"""How much of what the class token reads comes from each token (Fayyaz et al. 2022, section 3.1).

    \[ S_n = \frac{\sum_h A_{h,cls,n} \lVert V_{h,n} \rVert}{\sum_m \sum_h A_{h,cls,m} \lVert V_{h,m} \rVert} \]

    The class token itself is not among the N tokens. Rows sum to 1; masked tokens have 0, and a row of nothing but
    zeros stays 0.

    Args:
        cls_attention: `[B, H, N]`, the class token's row of the attention matrix.
        value_norms: `[B, H, N]`, the Euclidean norm of each token's value.
        mask: `[B, N]`, True at real tokens.
    """
    with autocast_off(cls_attention):
        cls_attention, value_norms = at_least_float32(cls_attention), at_least_float32(value_norms)
        if mask is not None:
            cls_attention = cls_attention.masked_fill(~mask[:, None], 0.0)
            value_norms = value_norms.masked_fill(~mask[:, None], 0.0)
        scores = (cls_attention * value_norms).sum(1)
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def with_prefix(sample: TokenSample, prefix: int, present: Bool[Tensor, "B P"] | None = None) -> TokenSample:
    """A sample of the tokens after a prefix as one of all tokens: the prefix first, where it is present."""
    if prefix == 0:
        return sample
    places = torch.arange(prefix, device=sample.ids.device).expand(sample.ids.shape[0], -1)
    ids = torch.cat((places, (sample.ids + prefix).masked_fill(~sample.mask, 0)), 1)
    present = torch.ones_like(places, dtype=torch.bool) if present is None else present
    return TokenSample(ids, torch.cat((present, sample.mask), 1))


def compact(kept: Bool[Tensor, "B N"], num_slots: int) -> TokenSample:
    """The positions of the True entries of each row, which are at most `num_slots`, moved to the front."""
    last = kept.new_full((), num_slots, dtype=torch.long)
    slots = torch.where(kept, kept.cumsum(1) - 1, last)  # what is not kept goes to one slot more, which is cut off
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(slots)
    ids = positions.new_zeros(kept.shape[0], num_slots + 1).scatter(1, slots, positions)[:, :num_slots]
    return TokenSample(ids, torch.arange(num_slots, device=kept.device) < kept.sum(1, keepdim=True))


def sample_of(
    sampled: Bool[Tensor, "B N"], real: Bool[Tensor, "B N"], num_samples: int, sample_always: bool, prefix: int = 0
) -> TokenSample:
    """What was sampled or, decided for each image, all real tokens where they fit; the prefix before them."""
    fits = real.sum(1, keepdim=True) <= (1 if sample_always else num_samples)
    return with_prefix(compact((sampled | fits) & real, num_samples), prefix)


def gather_tokens(tokens: Float[Tensor, "B N *D"], ids: Int[Tensor, "B K"]) -> Float[Tensor, "B K *D"]:
    """The tokens at positions `ids` of their image."""
    starts = torch.arange(tokens.shape[0], device=ids.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (starts + ids).flatten()).unflatten(0, ids.shape)
