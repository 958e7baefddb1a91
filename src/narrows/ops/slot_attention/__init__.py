"""Slot attention: slots compete for tokens."""

from narrows.ops.slot_attention.api import (
    IMPLEMENTATIONS,
    SlotAttentionResult,
    iterate,
    read_slots,
    slot_attention,
    why_no_kernels,
    why_not_iterate,
)
from narrows.ops.slot_attention.common import Settings, Weights
from narrows.ops.slot_attention.slot_update import SlotUpdate, update_slots
from narrows.ops.slot_attention.token_update import Cell, Reading, TokenUpdate, update_tokens

__all__ = [
    "IMPLEMENTATIONS",
    "Cell",
    "Reading",
    "Settings",
    "SlotAttentionResult",
    "SlotUpdate",
    "TokenUpdate",
    "Weights",
    "iterate",
    "read_slots",
    "slot_attention",
    "update_slots",
    "update_tokens",
    "why_no_kernels",
    "why_not_iterate",
]
