"""The cost of a model: parameters, MACs with the tokens really kept, memory, speed."""

from narrows.costs.cost import Cost, evaluating, measure
from narrows.costs.macs import CarriesPadding, count_macs, macs_per_sample
from narrows.costs.memory import peak_memory, saved_for_backward
from narrows.costs.speed import Spread, Timing, compare_speed

__all__ = [
    "CarriesPadding",
    "Cost",
    "Spread",
    "Timing",
    "compare_speed",
    "count_macs",
    "evaluating",
    "macs_per_sample",
    "measure",
    "peak_memory",
    "saved_for_backward",
]
