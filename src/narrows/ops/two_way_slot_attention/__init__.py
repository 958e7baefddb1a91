"""Two-way slot attention: slots read tokens and tokens read slots, in turn."""

from narrows.ops.two_way_slot_attention.api import IMPLEMENTATIONS, TwoWaySlotAttentionResult, two_way_slot_attention
from narrows.ops.two_way_slot_attention.common import Exchange, TwoWaySlotAttentionWeights

__all__ = [
    "IMPLEMENTATIONS",
    "Exchange",
    "TwoWaySlotAttentionResult",
    "TwoWaySlotAttentionWeights",
    "two_way_slot_attention",
]
