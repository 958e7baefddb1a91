"""Slot attention: slots compete for tokens."""

from narrows.ops.slot_attention.api import (
    IMPLEMENTATIONS,
    SlotAttentionResult,
    iterate,
    iterate_both,
    read_slots,
    slot_attention,
    why_no_kernels,
    why_not_iterate,
    why_not_two_way,
)
from narrows.ops.slot_attention.common import Settings, TwoWaySettings, Weights
from narrows.ops.slot_attention.token_update import Cell, Reading, TokenUpdate, update_tokens

__all__ = [
    "IMPLEMENTATIONS",
    "Cell",
    "Reading",
    "Settings",
    "SlotAttentionResult",
    "TokenUpdate",
    "TwoWaySettings",
    "Weights",
    "iterate",
    "iterate_both",
    "read_slots",
    "slot_attention",
    "update_tokens",
    "why_no_kernels",
    "why_not_iterate",
    "why_not_two_way",
]
