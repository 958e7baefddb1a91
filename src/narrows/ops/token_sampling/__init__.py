"""Adaptive token sampling (Fayyaz et al. 2022, arXiv 2111.15667)."""

from narrows.ops.token_sampling.api import (
    GUMBEL_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    QUANTILE_IMPLEMENTATIONS,
    gumbel_sample,
    inverse_transform_sample,
    restore,
    sampled_attention,
)
from narrows.ops.token_sampling.common import (
    Queries,
    SampledTokens,
    Sampler,
    TokenSample,
    gather_tokens,
    significance,
    with_prefix,
)

__all__ = [
    "GUMBEL_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "QUANTILE_IMPLEMENTATIONS",
    "Queries",
    "SampledTokens",
    "Sampler",
    "TokenSample",
    "gather_tokens",
    "gumbel_sample",
    "inverse_transform_sample",
    "restore",
    "sampled_attention",
    "significance",
    "with_prefix",
]
