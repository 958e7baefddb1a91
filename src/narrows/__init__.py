"""Token bottlenecks for PyTorch: layers that make many tokens pass through few carriers.

Slot attention, soft mixtures of experts, separable window attention, the Perceiver resampler with gated cross
attention, and adaptive token sampling: each exact to its paper and to the code people use today, and faster.
"""

import importlib
from typing import TYPE_CHECKING

from narrows._version import __version__

if TYPE_CHECKING:
    from narrows.adapters import Audit, Reduction, TargetLatency, TargetMACs, audit, reduce_tokens
    from narrows.adapters.flamingo import Flamingo
    from narrows.checkpoints import from_upstream
    from narrows.costs import Cost, measure
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
    from narrows.models import ATSViT, ObjectDiscovery, SepViT, create_model, list_models, load_model
    from narrows.ops.media_attention import AllPrevious, ConsecutiveGroup, LastMedia, LastMedium
    from narrows.routing import Routing

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

# Imported when asked for, so that the command line says its version without torch.
_PLACES = {
    "adapters": (
        "Audit",
        "Reduction",
        "TargetLatency",
        "TargetMACs",
        "audit",
        "reduce_tokens",
    ),
    "adapters.flamingo": ("Flamingo",),
    "checkpoints": ("from_upstream",),
    "costs": (
        "Cost",
        "measure",
    ),
    "errors": ("NarrowsError",),
    "layers": (
        "AdaptiveTokenSampler",
        "DynamicSlotsSoftMoE",
        "GatedCrossAttentionBlock",
        "MaskedCrossAttention",
        "PerceiverResampler",
        "SeparableAttention",
        "SlotAttention",
        "SoftMoE",
        "TwoWaySlotAttention",
    ),
    "models": (
        "ATSViT",
        "ObjectDiscovery",
        "SepViT",
        "create_model",
        "list_models",
        "load_model",
    ),
    "ops.media_attention": (
        "AllPrevious",
        "ConsecutiveGroup",
        "LastMedia",
        "LastMedium",
    ),
    "routing": ("Routing",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_ROOMS = (
    *("adapters", "checkpoints", "costs", "data", "errors", "layers"),
    *("metrics", "models", "ops", "routing", "visualize"),
)


def __getattr__(name: str) -> object:
    """A public name, or a room of the package."""
    if name in _PLACE_OF:
        value = getattr(importlib.import_module(f"narrows.{_PLACE_OF[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"narrows.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
