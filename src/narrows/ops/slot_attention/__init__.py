"""Slot attention: K slots compete for N tokens and read what they win, a few times over."""

from narrows.ops.slot_attention.api import IMPLEMENTATIONS, SlotAttentionResult, slot_attention
from narrows.ops.slot_attention.common import GRU, MLP, Affine, SlotAttentionWeights

__all__ = ["GRU", "IMPLEMENTATIONS", "MLP", "Affine", "SlotAttentionResult", "SlotAttentionWeights", "slot_attention"]
