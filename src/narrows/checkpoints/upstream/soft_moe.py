"""Modules of `soft-moe-pytorch` (0.1.9): SoftMoE and DynamicSlotsSoftMoE."""

from typing import Any

import torch
from torch import nn

from narrows.errors import InvalidArgument
from narrows.layers.experts import StackedExperts
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, GainNormalization, SoftMoE


def _expert_options(experts: nn.ModuleList) -> dict[str, Any]:
    _, activation, dropout, linear_out = experts[0]  # type: ignore[misc]
    gated = not isinstance(activation, nn.GELU)
    dim, hidden = linear_out.out_features, linear_out.in_features
    # A hidden width is rounded down from a multiple of dim; half a channel more survives that rounding.
    mult = (hidden + 0.5) / dim * (1.5 if gated else 1)
    return {
        "num_experts": len(experts),
        "experts": "geglu" if gated else "gelu",
        "expert_mult": mult,
        "dropout": dropout.p,
    }


@torch.no_grad()
def _copy_experts(source: nn.ModuleList, target: nn.Module) -> None:
    assert isinstance(target, StackedExperts)
    for index, (linear_in, _, _, linear_out) in enumerate(source):  # type: ignore[misc]
        target.weight_in[index] = linear_in.weight
        target.bias_in[index] = linear_in.bias
        target.weight_out[index] = linear_out.weight
        target.bias_out[index] = linear_out.bias


@torch.no_grad()
def _copy_gains(token_norm: Any, slot_norm: Any, target: nn.Module) -> None:
    assert isinstance(target, GainNormalization)
    target.token_gain.copy_(token_norm.gamma)
    target.slot_gain.copy_(slot_norm.gamma)


def _soft_moe(module: Any) -> nn.Module:
    if module.experts.is_distributed:
        raise InvalidArgument(
            "module",
            expected="a SoftMoE whose experts are on one machine",
            got="is_distributed=True",
            hint="Build it with is_distributed=False and load the same state dict.",
        )
    _, slots_per_expert, dim = module.slot_embeds.shape
    if slots_per_expert == 0:
        raise InvalidArgument(
            "module",
            expected="a SoftMoE with at least one slot for each expert",
            got="0 slots, whose output is all zeros",
            hint="Its seq_len is below num_experts; there is nothing to convert.",
        )
    experts = module.experts.experts
    converted = SoftMoE(
        dim,
        slots_per_expert=slots_per_expert,
        normalization="layer" if hasattr(module.norm, "beta") else "rms",
        **_expert_options(experts),
    )
    _copy_experts(experts, converted.experts)
    _copy_gains(module.norm, module.slot_norm, converted.normalization)
    with torch.no_grad():
        converted.slots.copy_(module.slot_embeds)
    return converted


def _dynamic_slots_soft_moe(module: Any) -> nn.Module:
    projection, _, slot_norm = module.to_slot_embeds
    converted = DynamicSlotsSoftMoE(projection.in_features, normalization="rms", **_expert_options(module.experts))
    _copy_experts(module.experts, converted.experts)
    _copy_gains(module.norm, slot_norm, converted.normalization)
    with torch.no_grad():
        converted.to_slots.weight.copy_(projection.weight)
    return converted


CONVERTERS = {
    "soft_moe_pytorch.soft_moe.SoftMoE": _soft_moe,
    "soft_moe_pytorch.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE": _dynamic_slots_soft_moe,
}
