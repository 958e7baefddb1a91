"""Token bottlenecks for PyTorch: layers that make many tokens pass through few carriers.

Slot attention, soft mixtures of experts, separable window attention, the Perceiver resampler with gated cross
attention, and adaptive token sampling: each exact to its paper and to the code people use today, and faster.
"""

from narrows._version import __version__
from narrows.checkpoints import from_upstream
from narrows.errors import NarrowsError
from narrows.layers import (
    AdaptiveTokenSampler,
    DynamicSlotsSoftMoE,
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    PerceiverResampler,
    SeparableAttention,
    SlotAttention,
    SoftMoE,
    TwoWaySlotAttention,
)
from narrows.measure import Cost, measure
from narrows.models import ATSViT, SepViT, create_model, list_models, load_model
from narrows.routing import Routing

__all__ = [
    "ATSViT",
    "AdaptiveTokenSampler",
    "Cost",
    "DynamicSlotsSoftMoE",
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "NarrowsError",
    "PerceiverResampler",
    "Routing",
    "SepViT",
    "SeparableAttention",
    "SlotAttention",
    "SoftMoE",
    "TwoWaySlotAttention",
    "__version__",
    "create_model",
    "from_upstream",
    "list_models",
    "load_model",
    "measure",
]
