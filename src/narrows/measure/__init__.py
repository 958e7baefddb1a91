"""What a model costs, with the tokens really kept; and whether its text depends on media it must not see."""

from narrows.measure.audit import Audit, Finding, audit
from narrows.measure.cost import Cost, evaluating, measure
from narrows.measure.macs import CarriesPadding, count_macs, macs_per_sample
from narrows.measure.memory import peak_memory, saved_for_backward
from narrows.measure.speed import Spread, Timing, compare_speed

__all__ = [
    "Audit",
    "CarriesPadding",
    "Cost",
    "Finding",
    "Spread",
    "Timing",
    "audit",
    "compare_speed",
    "count_macs",
    "evaluating",
    "macs_per_sample",
    "measure",
    "peak_memory",
    "saved_for_backward",
]
