"""Token bottlenecks for PyTorch: layers that make many tokens pass through few carriers.

Slot attention, soft mixtures of experts, separable window attention, the Perceiver resampler with gated cross
attention, and adaptive token sampling: each exact to its paper and to the code people use today, and faster.
"""

from typing import TYPE_CHECKING

from narrows._version import __version__
from narrows.adapters import Audit, Reduction, TargetLatency, TargetMACs, audit, reduce_tokens
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
from narrows.models import ATSViT, ObjectDiscovery, SepViT, create_model, list_models, load_model
from narrows.ops.media_attention import AllPrevious, ConsecutiveGroup, LastMedia, LastMedium
from narrows.routing import Routing

if TYPE_CHECKING:
    from narrows.adapters.flamingo import Flamingo

__all__ = [
    "ATSViT",
    "AdaptiveTokenSampler",
    "AllPrevious",
    "Audit",
    "ConsecutiveGroup",
    "Cost",
    "DynamicSlotsSoftMoE",
    "Flamingo",
    "GatedCrossAttentionBlock",
    "LastMedia",
    "LastMedium",
    "MaskedCrossAttention",
    "NarrowsError",
    "ObjectDiscovery",
    "PerceiverResampler",
    "Reduction",
    "Routing",
    "SepViT",
    "SeparableAttention",
    "SlotAttention",
    "SoftMoE",
    "TargetLatency",
    "TargetMACs",
    "TwoWaySlotAttention",
    "__version__",
    "audit",
    "create_model",
    "from_upstream",
    "list_models",
    "load_model",
    "measure",
    "reduce_tokens",
]


def __getattr__(name: str) -> object:
    """`Flamingo` is imported when it is asked for: it needs transformers."""
    if name != "Flamingo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from narrows.adapters.flamingo import Flamingo

    return Flamingo
