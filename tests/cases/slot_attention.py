"""Slot attention and two-way slot attention, with initial slots drawn or learned."""

import torch
from torch import Tensor, nn

from narrows.layers.slot_attention import LearnedSlots, SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.cases import LayerCase

IMPLS = ("reference", "absorbed")


def with_random_vectors(layer: nn.Module) -> nn.Module:
    """Biases and LayerNorms away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in layer.parameters() if p.ndim == 1):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def one_way(**kwargs: object) -> nn.Module:
    return with_random_vectors(SlotAttention(16, num_slots=4, slot_dim=12, mlp_dim=20, **kwargs))


def heads(**kwargs: object) -> nn.Module:
    layer = SlotAttention(
        16, num_slots=4, slot_dim=12, heads=2, head_dim=5, joint_heads=True, qkv_bias=True, mlp_dim=20, **kwargs
    )
    return with_random_vectors(layer)


def two_way(**kwargs: object) -> nn.Module:
    return with_random_vectors(
        TwoWaySlotAttention(16, num_slots=4, num_iterations=2, slot_dim=12, mlp_dim=20, **kwargs)
    )


def learned(**kwargs: object) -> nn.Module:
    layer = SlotAttention(16, num_slots=4, slot_dim=12, mlp_dim=20, initial_slots=LearnedSlots(4, 12), **kwargs)
    return with_random_vectors(layer)


def inputs(batch: int) -> dict[str, Tensor]:
    return {"tokens": torch.randn(batch, 9, 16)}


def outputs(result: object) -> dict[str, Tensor]:
    return result._asdict()  # type: ignore[attr-defined]


CASES = [
    LayerCase(name, build, inputs, outputs, padded={"mask": "tokens"}, per_token=per_token, impls=IMPLS, random=random)
    for name, build, per_token, random in (
        ("SlotAttention", one_way, (), True),
        ("SlotAttention-heads", heads, (), True),
        ("SlotAttention-learned", learned, (), False),
        ("TwoWaySlotAttention", two_way, ("tokens",), True),
    )
]
