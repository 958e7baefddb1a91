"""Adaptive token sampling as the paper has it (Fayyaz et al. 2022, arXiv 2111.15667)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.token_sampling.common import (
    GUMBEL_EPSILON,
    Queries,
    SampledTokens,
    Sampler,
    TokenSample,
    sample_of,
    significance,
    with_prefix,
)
from narrows.precision import at_least_float32, autocast_off


def inverse_transform_sample(
    scores: Float[Tensor, "B N"], num_samples: int, mask: Bool[Tensor, "B N"] | None, sample_always: bool, prefix: int
) -> TokenSample:
    """Section 3.2 of the paper with the quantiles of the authors' release, in whole numbers: nothing is rounded."""
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    never = 2**62  # more than any distance between numbers here
    # Scores as whole numbers, the greatest 2^32; where none is positive all count the same.
    scores = scores.double().masked_fill(~real, 0.0)
    greatest_score = scores.amax(1, keepdim=True)
    weights = (torch.where(greatest_score > 0, scores / greatest_score, 1.0) * 2.0**32).round().long()
    # Sorted ascending (of equal ones the first first), summed up, the least subtracted: the cumulative distribution.
    # Masked tokens come before all others.
    ascending, order = weights.masked_fill(~real, -1).sort(dim=1, stable=True)
    sorted_real = ascending >= 0
    least_weight = ascending.masked_fill(~sorted_real, never).amin(1, keepdim=True)
    cdf = ascending.clamp_min(0).cumsum(1) - least_weight
    # K quantiles, evenly spaced from its least entry above zero to its greatest; all times `steps` to stay whole.
    least, greatest, steps = cdf.masked_fill(cdf <= 0, never).amin(1), cdf[:, -1], max(num_samples - 1, 1)
    k = torch.arange(num_samples, device=scores.device)
    quantiles = (greatest * steps)[:, None] - k * (greatest - least)[:, None]
    # The token of the nearest entry, the lower of two equally near ones; duplicates merge.
    distances = (cdf[:, None] * steps - quantiles[..., None]).abs().masked_fill(~sorted_real[:, None], never)
    nearest = order.gather(1, distances.argmin(-1))
    return sample_of(torch.zeros_like(real).scatter(1, nearest, True), real, num_samples, sample_always, prefix)


def gumbel_sample(
    scores: Float[Tensor, "B N"],
    num_samples: int,
    mask: Bool[Tensor, "B N"] | None,
    sample_always: bool,
    generator: torch.Generator | None,
) -> TokenSample:
    """`num_samples` draws with replacement by the Gumbel-max trick, duplicates merged."""
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    with autocast_off(scores):
        probabilities = at_least_float32(scores)
        shape = (scores.shape[0], num_samples, scores.shape[1])
        uniform = probabilities.new_empty(shape).uniform_(generator=generator)
        gumbel = -((-(uniform + GUMBEL_EPSILON).log() + GUMBEL_EPSILON).log())
        logits = (probabilities + GUMBEL_EPSILON).log()[:, None] + gumbel
        winners = logits.masked_fill(~real[:, None], -torch.inf).argmax(-1)
    return sample_of(torch.zeros_like(real).scatter(1, winners, True), real, num_samples, sample_always)


def sampled_attention(
    class_query: Float[Tensor, "B H d"],
    queries: Queries,
    key: Float[Tensor, "B N H d"],
    value: Float[Tensor, "B N H d"],
    sampler: Sampler,
    mask: Bool[Tensor, "B N"] | None,
    dropout: float,
) -> SampledTokens:
    """Section 3: the whole attention matrix, of which the rows of the sampled tokens are kept."""
    dtype, (batch, num_tokens, heads, width) = key.dtype, key.shape
    positions = torch.arange(num_tokens, device=key.device)
    real = torch.ones(batch, num_tokens, dtype=torch.bool, device=key.device) if mask is None else mask
    readable = (real | (positions == 0))[:, None, None]  # the class token always, so that no row is empty
    query = queries(positions.expand(batch, -1))
    with autocast_off(key):
        # The class token's row has a query of its own: it is what decides which others are needed.
        query = torch.cat((class_query[:, None], query), 1)
        query, key, value = (at_least_float32(part).transpose(1, 2) for part in (query, key, value))
        logits = query @ key.transpose(-1, -2) / width**0.5
        attention = logits.masked_fill(~readable, -torch.inf).softmax(-1)  # [B, H, 1 + N, N]
        decides, attention = attention[:, :, 0], attention[:, :, 1:]

        scores = significance(decides[..., 1:], value[:, :, 1:].norm(dim=-1), real[:, 1:]).detach()
        class_token, others = (None, None) if mask is None else (mask[:, :1], mask[:, 1:])
        ids, kept = with_prefix(sampler(scores, others), 1, class_token)

        rows = ids[:, None, :, None].expand(-1, heads, -1, num_tokens)
        attended = (F.dropout(attention.gather(2, rows), dropout) @ value).transpose(1, 2).flatten(2)
        return SampledTokens(attended.to(dtype), ids, kept)
