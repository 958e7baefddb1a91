"""Soft mixture of experts."""

from narrows.ops.soft_moe.api import IMPLEMENTATIONS, soft_moe
from narrows.ops.soft_moe.experts import ExpertWeights, feed_forward
from narrows.ops.soft_moe.normalization import rms_vectors, unit_vectors
from narrows.ops.soft_moe.reference import dispatch_weights
from narrows.ops.soft_moe.segments import Segments, segments_in_number, segments_of_length

__all__ = [
    "IMPLEMENTATIONS",
    "ExpertWeights",
    "Segments",
    "dispatch_weights",
    "feed_forward",
    "rms_vectors",
    "segments_in_number",
    "segments_of_length",
    "soft_moe",
    "unit_vectors",
]
