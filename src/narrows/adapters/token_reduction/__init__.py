"""Token reduction for vision transformers that people already have."""

from narrows.adapters.token_reduction.methods import (
    METHODS,
    Merge,
    MergedTokens,
    Merging,
    Pruning,
    ReductionMethod,
    Scoring,
    Signals,
)
from narrows.adapters.token_reduction.reduce import reduce_tokens
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.adapters.token_reduction.targets import CostTarget, TargetLatency, TargetMACs

__all__ = [
    "METHODS",
    "CostTarget",
    "Merge",
    "MergedTokens",
    "Merging",
    "Pruning",
    "Reduction",
    "ReductionMethod",
    "Scoring",
    "Signals",
    "TargetLatency",
    "TargetMACs",
    "reduce_tokens",
]
