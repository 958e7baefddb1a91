"""Layers: parameters, initialisation and shapes. The mathematics is in `narrows.ops`."""

from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.layers.separable_attention import SeparableAttention
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, SoftMoE
from narrows.layers.token_sampling import AdaptiveTokenSampler
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention

__all__ = [
    "AdaptiveTokenSampler",
    "DynamicSlotsSoftMoE",
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "PerceiverResampler",
    "SeparableAttention",
    "SlotAttention",
    "SoftMoE",
    "TwoWaySlotAttention",
]
