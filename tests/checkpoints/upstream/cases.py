"""Upstream modules that `from_upstream` understands, small and random everywhere, and how each is called."""

from collections.abc import Callable
from typing import NamedTuple

import flamingo_pytorch
import slot_attention
import soft_moe_pytorch
import torch
from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention
from torch import Tensor, nn
from vit_pytorch import ats_vit, sep_vit

from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.gated_cross_attention import MaskedCrossAttention as OurMaskedCrossAttention
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, SoftMoE
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from narrows.models import UpstreamSepViT
from narrows.models.vit import ATSViT


class Case(NamedTuple):
    """An upstream module.

    Args:
        make: makes it.
        shapes: of its tensor arguments.
        ours: what it becomes.
        locations: whether its third argument is where media stand.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    ours: type[nn.Module]
    locations: bool = False

    def build(self) -> nn.Module:
        """The module, with dropout off in its modes of today and no parameter at 0 or 1."""
        torch.manual_seed(1)
        module = self.make()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return module

    def inputs(self) -> list[Tensor]:
        """Arguments that want gradients."""
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in self.shapes]

    def rest(self) -> dict[str, Tensor]:
        """The other arguments."""
        return {"media_locations": torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]).bool()} if self.locations else {}


def _sep_vit() -> nn.Module:
    return sep_vit.SepViT(num_classes=3, dim=4, depth=(1, 1), heads=(1, 2), dropout=0.25)


def _ats_vit() -> nn.Module:
    return ats_vit.ViT(
        image_size=16, patch_size=4, num_classes=3, dim=8, depth=2, max_tokens_per_depth=(16, 6), heads=2, mlp_dim=12,
        dim_head=4, dropout=0.25, emb_dropout=0.125,
    )  # fmt: skip


def _gated_block() -> nn.Module:
    return flamingo_pytorch.GatedCrossAttentionBlock(dim=12, heads=2, dim_head=4)


CASES = {
    "SlotAttention": Case(lambda: slot_attention.SlotAttention(3, 12), ((2, 7, 12),), SlotAttention),
    "MultiHeadSlotAttention": Case(
        lambda: slot_attention.MultiHeadSlotAttention(3, 12, heads=2, dim_head=5), ((2, 7, 12),), SlotAttention
    ),
    "SlotAttentionExperimental": Case(
        lambda: slot_attention.SlotAttentionExperimental(3, 12, iters=2), ((2, 7, 12),), TwoWaySlotAttention
    ),
    "SoftMoE": Case(
        lambda: soft_moe_pytorch.SoftMoE(8, num_experts=3, num_slots=2, dropout=0.25), ((2, 5, 8),), SoftMoE
    ),
    "SoftMoE gated": Case(
        lambda: soft_moe_pytorch.SoftMoE(8, num_experts=3, num_slots=2, geglu=True, use_layernorm=True),
        ((2, 5, 8),),
        SoftMoE,
    ),
    "DynamicSlotsSoftMoE": Case(  # six tokens: where it pads, upstream raises below float32
        lambda: soft_moe_pytorch.DynamicSlotsSoftMoE(8, num_experts=3, dropout=0.25), ((2, 6, 8),), DynamicSlotsSoftMoE
    ),
    "SepViT": Case(_sep_vit, ((2, 3, 56, 56),), UpstreamSepViT),
    "ATSViT": Case(_ats_vit, ((2, 3, 16, 16),), ATSViT),
    "PerceiverResampler": Case(
        lambda: flamingo_pytorch.PerceiverResampler(dim=8, depth=2, heads=2, dim_head=4, num_latents=3),
        ((2, 5, 8),),
        PerceiverResampler,
    ),
    "MaskedCrossAttention": Case(
        lambda: MaskedCrossAttention(dim=12, heads=2, dim_head=4),
        ((2, 5, 12), (2, 2, 3, 12)),
        OurMaskedCrossAttention,
        locations=True,
    ),
    "GatedCrossAttentionBlock": Case(
        _gated_block, ((2, 5, 12), (2, 2, 3, 12)), GatedCrossAttentionBlock, locations=True
    ),
}
