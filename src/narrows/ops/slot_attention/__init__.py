"""Slot attention: slots compete for tokens."""

from narrows.ops.slot_attention.api import IMPLEMENTATIONS, SlotAttentionResult, read_slots, slot_attention
from narrows.ops.slot_attention.token_update import Cell, Reading, TokenUpdate, update_tokens

__all__ = [
    "IMPLEMENTATIONS",
    "Cell",
    "Reading",
    "SlotAttentionResult",
    "TokenUpdate",
    "read_slots",
    "slot_attention",
    "update_tokens",
]
