"""Methods of token reduction, each one small class; a new one is passed in."""

from collections.abc import Mapping
from types import MappingProxyType

from narrows.adapters.token_reduction.methods.ats import ATS
from narrows.adapters.token_reduction.methods.base import Merge, Merging, Pruning, ReductionMethod
from narrows.adapters.token_reduction.methods.evit import EViT
from narrows.adapters.token_reduction.methods.random import Random
from narrows.adapters.token_reduction.methods.tome import ToMe
from narrows.adapters.token_reduction.methods.topk import TopK

METHODS: Mapping[str, type[ReductionMethod]] = MappingProxyType(
    {"ats": ATS, "topk": TopK, "evit": EViT, "tome": ToMe, "random": Random}
)

__all__ = ["ATS", "METHODS", "EViT", "Merge", "Merging", "Pruning", "Random", "ReductionMethod", "ToMe", "TopK"]
