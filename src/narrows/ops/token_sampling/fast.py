"""The fast forms: sampling in fixed shapes without comparing all with all, attention without the attention matrix."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.attention import attention
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
    r"""The reference's token sets, by counting instead of searching.

    Quantiles are evenly spaced, so that how many of them lie above a point of the distribution is one division. A token
    is nearest to some quantile exactly if fewer lie above the midpoint to its successor than above the midpoint to its
    predecessor; that names every sampled token once and leaves no duplicates to remove. Whole numbers throughout (exact
    for N K < 2^30), so that neither device nor batch nor order of summation can change a set.
    """
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    weights = _whole(scores, real)
    # Numbered, so that equal weights keep their order in a plain sort: ONNX has no stable one.
    places = torch.arange(scores.shape[1], device=scores.device)
    order = (weights * scores.shape[1] + places).sort(dim=1).indices
    ascending = weights.gather(1, order)
    # Masked tokens have weight 0: they come first, at entries of 0, which no quantile is nearest to.
    cdf = _positive(ascending.cumsum(1) - _first(ascending, after=~real), otherwise=0)
    greatest, steps = cdf[:, -1:], max(num_samples - 1, 1)
    least = _first(cdf, after=cdf <= 0)

    # Quantiles above the midpoint of each token's entry and its predecessor's, cdf - ascending / 2.
    spacing = _positive(2 * (greatest - least), otherwise=1)
    # Not `torch.div(..., rounding_mode="floor")`, which ONNX computes in float32.
    above = -((2 * (cdf - greatest) - ascending) * steps // spacing)
    above = above.clamp(0, num_samples)
    is_last = places == scores.shape[1] - 1
    nearest = torch.zeros_like(real).scatter(1, order, (above > above.roll(-1, 1)) | is_last)
    return sample_of(nearest, real, num_samples, sample_always, prefix)


def gumbel_sample(
    scores: Float[Tensor, "B N"],
    num_samples: int,
    mask: Bool[Tensor, "B N"] | None,
    sample_always: bool,
    generator: torch.Generator | None,
) -> TokenSample:
    """The reference's draws from the same noise, as an exponential race: argmax log u / p, one logarithm less."""
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    with autocast_off(scores):
        probabilities = (at_least_float32(scores) + GUMBEL_EPSILON).masked_fill(~real, 0.0)
        shape = (scores.shape[0], num_samples, scores.shape[1])
        noise = probabilities.new_empty(shape).uniform_(generator=generator)
        # Times of arrival, negative: the first is the greatest. Only the last step may not be in place: under
        # `torch.func.vmap` the noise may be the same for all, and the probabilities are not.
        arrivals = noise.add_(GUMBEL_EPSILON).log_().sub_(GUMBEL_EPSILON) / probabilities[:, None]
        winners = arrivals.max(-1).indices
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
    """The class token's row of attention first, for the scores; then that of the sampled tokens alone, fused."""
    # The class token may always be read, so that no row of attention is empty.
    readable = None if mask is None else torch.cat((torch.ones_like(mask[:, :1]), mask[:, 1:]), 1)
    scores = _scores(class_query.detach(), key.detach(), value.detach(), readable)
    class_token, others = (None, None) if mask is None else (mask[:, :1], mask[:, 1:])
    ids, kept = with_prefix(sampler(scores, others), 1, class_token)
    attended = attention(
        queries(ids).transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if readable is None else readable[:, None, None, :],
        dropout=dropout,
    )
    return SampledTokens(attended.transpose(1, 2).flatten(2), ids, kept)


def _whole(scores: Tensor, real: Tensor) -> Tensor:
    """Scores as whole numbers, the greatest of a row 2^32; a row without a positive score counts as flat."""
    scores = scores.double().masked_fill(~real, 0.0)
    top = scores.amax(1, keepdim=True)
    shares = torch.where(top > 0, scores / top, 1.0)
    return (shares * 2.0**32).round().long().masked_fill(~real, 0)


def _positive(numbers: Tensor, *, otherwise: int) -> Tensor:
    """Not `clamp_min`: of numbers beyond 32 bits, ONNX Runtime finds neither the greater nor the least."""
    return torch.where(numbers > 0, numbers, otherwise)


def _first(ascending: Tensor, *, after: Tensor) -> Tensor:
    """`[B, 1]`: the first of ascending numbers after so many; the last where that is all."""
    return ascending.gather(1, after.sum(1, keepdim=True).clamp_max(ascending.shape[1] - 1))


def _scores(
    class_query: Float[Tensor, "B H d"],
    key: Float[Tensor, "B N H d"],
    value: Float[Tensor, "B N H d"],
    readable: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B M"]:
    """Significance of the tokens after the class token."""
    with autocast_off(key):
        query, key, value = at_least_float32(class_query), at_least_float32(key), at_least_float32(value)
        logits = torch.einsum("bhd,bnhd->bhn", query, key) * query.shape[-1] ** -0.5
        norms = torch.linalg.vector_norm(value, dim=-1).transpose(1, 2)
        if readable is None:
            return significance(logits.softmax(-1)[..., 1:], norms[..., 1:])
        weights = logits.masked_fill(~readable[:, None], -torch.inf).softmax(-1)
        return significance(weights[..., 1:], norms[..., 1:], readable[:, 1:])
