"""Slot attention and two-way slot attention, with initial slots drawn or learned."""

import torch
from torch import Tensor, nn

from narrows.layers.initial_slots import LearnedSlots
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.cases import LayerCase

IMPLS = ("reference", "mixed", "absorbed")


def fill(layer: nn.Module) -> None:
    """Biases and LayerNorms away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in layer.parameters() if p.ndim == 1):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def one_way(**kwargs: object) -> nn.Module:
    return SlotAttention(16, num_slots=4, slot_dim=12, mlp_dim=20, **kwargs)


def heads(**kwargs: object) -> nn.Module:
    return SlotAttention(
        16, num_slots=4, slot_dim=12, heads=2, head_dim=5, joint_heads=True, qkv_bias=True, mlp_dim=20, **kwargs
    )


def two_way(**kwargs: object) -> nn.Module:
    return TwoWaySlotAttention(16, num_slots=4, num_iterations=2, slot_dim=12, mlp_dim=20, **kwargs)


def learned(**kwargs: object) -> nn.Module:
    own = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
    return SlotAttention(16, num_slots=4, slot_dim=12, mlp_dim=20, initial_slots=LearnedSlots(4, 12, **own), **kwargs)


def inputs(batch: int) -> dict[str, Tensor]:
    return {"tokens": torch.randn(batch, 9, 16)}


def outputs(result: object) -> dict[str, Tensor]:
    return result._asdict()  # type: ignore[attr-defined]


CASES = [
    LayerCase(
        name,
        build,
        inputs,
        outputs,
        padded={"mask": "tokens"},
        per_token=per_token,
        impls=IMPLS,
        random=random,
        fill=fill,
    )
    for name, build, per_token, random in (
        ("SlotAttention", one_way, (), True),
        ("SlotAttention-heads", heads, (), True),
        ("SlotAttention-learned", learned, (), False),
        ("TwoWaySlotAttention", two_way, ("tokens",), True),
    )
]
