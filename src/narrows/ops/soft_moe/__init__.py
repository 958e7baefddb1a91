"""Soft mixture of experts."""

from narrows.ops.soft_moe.api import IMPLEMENTATIONS, soft_moe
from narrows.ops.soft_moe.experts import activation, stacked_feed_forward, stacked_linear
from narrows.ops.soft_moe.reference import combine_weights, dispatch_weights
from narrows.ops.soft_moe.segments import Segments, segments_in_number, segments_of_length

__all__ = [
    "IMPLEMENTATIONS",
    "Segments",
    "activation",
    "combine_weights",
    "dispatch_weights",
    "segments_in_number",
    "segments_of_length",
    "soft_moe",
    "stacked_feed_forward",
    "stacked_linear",
]
