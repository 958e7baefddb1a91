"""Separable attention: attention inside each window, then attention between windows through one token for each."""

from narrows.ops.separable_attention.api import IMPLEMENTATIONS, separable_attention, window_token_attention
from narrows.ops.separable_attention.common import PointwiseWeights, SeparableAttentionWeights
from narrows.ops.separable_attention.order import WindowOrder
from narrows.ops.separable_attention.windows import from_windows, to_windows

__all__ = [
    "IMPLEMENTATIONS",
    "PointwiseWeights",
    "SeparableAttentionWeights",
    "WindowOrder",
    "from_windows",
    "separable_attention",
    "to_windows",
    "window_token_attention",
]
