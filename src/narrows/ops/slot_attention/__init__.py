"""Slot attention: slots compete for tokens."""

from narrows.ops.slot_attention.api import IMPLEMENTATIONS, SlotAttentionResult, read_slots, slot_attention
from narrows.ops.slot_attention.common import token_weights

__all__ = ["IMPLEMENTATIONS", "SlotAttentionResult", "read_slots", "slot_attention", "token_weights"]
