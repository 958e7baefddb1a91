from collections.abc import Callable

import torch
from torch import nn

from narrows.layers.soft_moe import DynamicSlotsSoftMoE, SoftMoE
from tests.cases import LayerCase

IMPLS = ("reference", "shared", "chunked")


def _tokens(batch: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randn(batch, 11, 16)}


def _soft_moe(**kwargs: object) -> nn.Module:
    return SoftMoE(16, num_experts=3, slots_per_expert=2, **kwargs)  # type: ignore[arg-type]


def _dynamic(**kwargs: object) -> nn.Module:
    return DynamicSlotsSoftMoE(16, num_experts=3, experts="geglu", **kwargs)  # type: ignore[arg-type]


def _dynamic_even(**kwargs: object) -> nn.Module:
    return DynamicSlotsSoftMoE(16, num_experts=3, slots_per_expert=2, **kwargs)  # type: ignore[arg-type]


def _dynamic_rms(**kwargs: object) -> nn.Module:
    return DynamicSlotsSoftMoE(16, num_experts=3, normalization="rms", **kwargs)  # type: ignore[arg-type]


def _small_gains(layer: nn.Module) -> None:
    # Gains of 1 make the softmax nearly one-hot, which multiplies every rounding of a logit, the reference's too.
    for gain in (layer.norm_tokens.weight, layer.norm_slots.weight):
        nn.init.uniform_(gain, 0.2, 0.4)


def _case(
    name: str,
    construct: Callable[..., nn.Module],
    fill: Callable[[nn.Module], object] = lambda layer: None,
    *,
    dynamic: bool = True,
) -> LayerCase:
    return LayerCase(
        name=name,
        construct=construct,
        fill=fill,
        inputs=_tokens,
        outputs=lambda tokens: {"tokens": tokens},  # type: ignore[dict-item]
        padded={"mask": "tokens"},
        per_token=("tokens",),
        impls=IMPLS,
        dynamic=dynamic,
    )


# Exported dynamic slots take any number of tokens above one segment (tests/layers/test_soft_moe.py); the generic test
# would go down to 2.
CASES = [
    _case("SoftMoE", _soft_moe),
    _case("DynamicSlotsSoftMoE", _dynamic, dynamic=False),
    _case("DynamicSlotsSoftMoE-even", _dynamic_even),
    _case("DynamicSlotsSoftMoE-rms", _dynamic_rms, _small_gains, dynamic=False),
    LayerCase(
        name="SoftMoE-images",
        construct=_soft_moe,
        inputs=lambda batch: {"tokens": torch.randn(batch, 16, 3, 4)},
        outputs=lambda tokens: {"tokens": tokens},  # type: ignore[dict-item]
        padded={},
        impls=IMPLS,
    ),
]
