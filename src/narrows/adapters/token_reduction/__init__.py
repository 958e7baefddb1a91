"""Token reduction for vision transformers that people already have."""

from narrows.adapters.token_reduction.methods import METHODS, Merge, Merging, Pruning, ReductionMethod, Signals
from narrows.adapters.token_reduction.reduce import reduce_tokens
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.adapters.token_reduction.targets import CostTarget, TargetLatency, TargetMACs

__all__ = [
    "METHODS",
    "CostTarget",
    "Merge",
    "Merging",
    "Pruning",
    "Reduction",
    "ReductionMethod",
    "Signals",
    "TargetLatency",
    "TargetMACs",
    "reduce_tokens",
]
