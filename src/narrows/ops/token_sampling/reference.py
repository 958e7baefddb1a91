"""Adaptive token sampling as the paper has it (Fayyaz et al. 2022, arXiv 2111.15667), one row after another."""

from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.token_sampling.common import (
    GUMBEL_EPSILON,
    AttentionWeights,
    SampledTokens,
    Sampler,
    TokenSample,
    significance,
    with_class_token,
)
from narrows.precision import at_least_float32, autocast_off


def inverse_transform_sample(
    scores: Float[Tensor, "B N"], num_samples: int, mask: Bool[Tensor, "B N"] | None, sample_always: bool
) -> TokenSample:
    """Section 3.2 of the paper with the quantiles of the authors' release, in whole numbers: nothing is rounded."""
    rows = []
    for row, ids in enumerate(_real_tokens(scores, mask)):
        fits = len(ids) <= (1 if sample_always else num_samples)
        rows.append(ids if fits else _sample_row([(scores[row, i].item(), i) for i in ids], num_samples))
    return _in_slots(rows, num_samples, scores.device)


def _sample_row(scored: list[tuple[float, int]], num_samples: int) -> list[int]:
    # Scores as whole numbers, the greatest 2^32; where none is positive all count the same.
    top = max(score for score, _ in scored)
    weights = [(round((score / top if top > 0 else 1.0) * 2**32), i) for score, i in scored]
    # Sorted ascending (of equal ones the first first), summed up, the least subtracted: the cumulative distribution.
    ascending = sorted(weights)
    cdf = [total - ascending[0][0] for total in accumulate(weight for weight, _ in ascending)]
    # K quantiles, evenly spaced from its least entry above zero to its greatest; all times `steps` to stay whole.
    least, greatest, steps = min(entry for entry in cdf if entry > 0), cdf[-1], max(num_samples - 1, 1)
    quantiles = [greatest * steps - k * (greatest - least) for k in range(num_samples)]
    # The token of the nearest entry, the lower of two equally near ones; duplicates merge.
    nearest = {min(range(len(cdf)), key=lambda j: abs(cdf[j] * steps - quantile)) for quantile in quantiles}
    return sorted(ascending[j][1] for j in nearest)


def gumbel_sample(
    scores: Float[Tensor, "B N"],
    num_samples: int,
    mask: Bool[Tensor, "B N"] | None,
    sample_always: bool,
    generator: torch.Generator | None,
) -> TokenSample:
    """`num_samples` draws with replacement by the Gumbel-max trick, duplicates merged."""
    with autocast_off(scores):
        probabilities = at_least_float32(scores)
        shape = (scores.shape[0], num_samples, scores.shape[1])
        uniform = probabilities.new_empty(shape).uniform_(generator=generator)
        gumbel = -((-(uniform + GUMBEL_EPSILON).log() + GUMBEL_EPSILON).log())
        rows = []
        for row, ids in enumerate(_real_tokens(scores, mask)):
            if len(ids) > (1 if sample_always else num_samples):
                logits = (probabilities[row, ids] + GUMBEL_EPSILON).log() + gumbel[row][:, ids]
                ids = [ids[i] for i in logits.argmax(-1).unique().tolist()]
            rows.append(ids)
    return _in_slots(rows, num_samples, scores.device)


def sampled_attention(
    tokens: Float[Tensor, "B N D"],
    weights: AttentionWeights,
    heads: int,
    sampler: Sampler,
    mask: Bool[Tensor, "B N"] | None,
    dropout: float,
) -> SampledTokens:
    """Section 3: the whole attention matrix, of which the rows of the sampled tokens are kept."""
    with autocast_off(tokens):
        dtype = tokens.dtype
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        tokens = at_least_float32(tokens).masked_fill(~real[..., None], 0.0)
        qkv, qkv_bias, out, out_bias = (None if w is None else w.to(tokens.dtype) for w in weights)
        assert qkv is not None
        assert out is not None
        query, key, value = F.linear(tokens, qkv, qkv_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        readable = real | (torch.arange(real.shape[1], device=real.device) == 0)
        attention = logits.masked_fill(~readable[:, None, None, :], -torch.inf).softmax(-1)  # [B, H, N, N]

        scores = significance(attention[:, :, 0, 1:], value[:, :, 1:].norm(dim=-1), real[:, 1:]).detach()
        ids, kept = with_class_token(sampler(scores, None if mask is None else mask[:, 1:]), mask)

        rows = ids[:, None, :, None].expand(-1, heads, -1, attention.shape[-1])
        attended = F.dropout(attention.gather(2, rows), dropout) @ value
        result = F.linear(attended.transpose(1, 2).flatten(2), out, out_bias)
        return SampledTokens(result.masked_fill(~kept[..., None], 0.0).to(dtype), ids, kept)


def _real_tokens(scores: Tensor, mask: Tensor | None) -> list[list[int]]:
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    return [row.nonzero().flatten().tolist() for row in real]


def _in_slots(rows: list[list[int]], num_slots: int, device: torch.device) -> TokenSample:
    ids = torch.zeros(len(rows), num_slots, dtype=torch.long, device=device)
    mask = torch.zeros(len(rows), num_slots, dtype=torch.bool, device=device)
    for row, kept in enumerate(rows):
        ids[row, : len(kept)] = torch.tensor(kept, dtype=torch.long, device=device)
        mask[row, : len(kept)] = True
    return TokenSample(ids, mask)
