"""Separable attention: attention inside each window, then attention between windows through one token for each."""

from narrows.ops.separable_attention.api import (
    IMPLEMENTATIONS,
    depthwise_attention,
    pointwise_attention,
    window_token_attention,
)
from narrows.ops.separable_attention.order import WindowOrder, from_windows, to_windows

__all__ = [
    "IMPLEMENTATIONS",
    "WindowOrder",
    "depthwise_attention",
    "from_windows",
    "pointwise_attention",
    "to_windows",
    "window_token_attention",
]
