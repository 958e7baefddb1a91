"""Soft mixture of experts."""

from narrows.ops.soft_moe.api import IMPLEMENTATIONS, soft_moe
from narrows.ops.soft_moe.normalization import rms_vectors, unit_vectors
from narrows.ops.soft_moe.reference import dispatch_weights
from narrows.ops.soft_moe.segments import Segments, segments_in_number, segments_of_length

__all__ = [
    "IMPLEMENTATIONS",
    "Segments",
    "dispatch_weights",
    "rms_vectors",
    "segments_in_number",
    "segments_of_length",
    "soft_moe",
    "unit_vectors",
]
