"""Modules of `soft-moe-pytorch`: SoftMoE and DynamicSlotsSoftMoE."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged
from narrows.errors import InvalidArgument
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, SoftMoE


def soft_moe(module: Any) -> Conversion:
    """Upstream's `SoftMoE`; experts on several machines are refused, and layers without slots."""
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
    ours = SoftMoE(
        dim,
        slots_per_expert=slots_per_expert,
        normalization="layer" if hasattr(module.norm, "beta") else "rms",
        **_expert_options(module.experts.experts),
    )
    modules, parameters = {"": "", "norm_slots": "slot_norm"}, {"slots": "slot_embeds"}
    return _conversion(ours, SoftMoEAsUpstream, module.experts.experts, "experts.experts", modules, parameters)


def dynamic_slots_soft_moe(module: Any) -> Conversion:
    """Upstream's `DynamicSlotsSoftMoE`."""
    ours = DynamicSlotsSoftMoE(
        module.to_slot_embeds[0].in_features, normalization="rms", **_expert_options(module.experts)
    )
    modules = {"": "", "to_slots": "to_slot_embeds.0", "norm_slots": "to_slot_embeds.2"}
    return _conversion(ours, DynamicSlotsSoftMoEAsUpstream, module.experts, "experts", modules, {})


def _is_gated(experts: Any) -> bool:
    return type(experts[0][1]).__name__ == "GEGLU"


def _expert_options(experts: Any) -> dict[str, Any]:
    dim, hidden = experts[0][3].out_features, experts[0][3].in_features
    # A hidden width is rounded down from a multiple of dim; half a channel more survives that rounding.
    mult = (hidden + 0.5) / dim * (1.5 if _is_gated(experts) else 1)
    return {"num_experts": len(experts), "experts": "geglu" if _is_gated(experts) else "gelu", "expert_mult": mult}


def _conversion(
    ours: nn.Module,
    as_upstream: type[nn.Module],
    experts: Any,
    name: str,
    modules: Mapping[str, str],
    parameters: Mapping[str, str],
) -> Conversion:
    """Expert e of upstream, `Linear, activation, Dropout, Linear`, becomes row e of the stacked experts."""
    gains = {"norm_tokens.weight": "norm.gamma", "norm_slots.weight": f"{modules['norm_slots']}.gamma"}
    each = [f"{name}.{index}" for index in range(len(experts))]
    stacked = {
        f"experts.{linear}.{kind}": Rearranged(tuple(f"{expert}.{place}.{kind}" for expert in each), _stack)
        for linear, place in (("expand", 0), ("contract", 3))
        for kind in ("weight", "bias")
    }
    stacks = {"experts.expand": f"{each[0]}.0", "experts.contract": f"{each[0]}.3"}
    inside: dict[int, type[nn.Module]] = {0: nn.Linear, 3: nn.Linear}
    if not _is_gated(experts):
        inside[1] = nn.GELU
    return Conversion(
        ours,
        as_upstream,
        {**modules, "norm_tokens": "norm", "experts": name, **stacks},
        {**parameters, **gains, **stacked},
        without_module={f"{expert}.{place}": kind for expert in each for place, kind in inside.items()},
        dropouts={"experts": tuple(f"{expert}.2" for expert in each)},
    )


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


class DynamicSlotsSoftMoEAsUpstream(DynamicSlotsSoftMoE):
    """`DynamicSlotsSoftMoE` that takes the mask of an image as `[B, H * W]`, as upstream's does."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore
        """The shape of `x`: `[B, N, D]` or `[B, D, H, W]`."""
        return super().forward(x, mask.view(-1, *x.shape[2:]) if mask is not None and x.ndim == 4 else mask)


class SoftMoEAsUpstream(SoftMoE):
    """`SoftMoE` that also takes single tokens `[B, D]` and the mask of an image as `[B, H * W]`, as upstream's does."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, mask: Tensor | None = None, add_noise: bool = False, noise_mult: float = 1.0
    ) -> Tensor:
        """The shape of `x`: `[B, D]`, `[B, N, D]` or `[B, D, H, W]`."""
        if add_noise:
            raise InvalidArgument(
                "add_noise", expected="False", got=add_noise, hint="The soft mixtures of narrows are deterministic."
            )
        if x.ndim == 2:
            return super().forward(x[:, None], mask)[:, 0]
        return super().forward(x, mask.view(-1, *x.shape[2:]) if mask is not None and x.ndim == 4 else mask)


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {
    "soft_moe_pytorch.soft_moe.SoftMoE": soft_moe,
    "soft_moe_pytorch.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE": dynamic_slots_soft_moe,
}
