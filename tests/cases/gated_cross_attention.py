"""Masked cross attention and the gated block, with more media tokens than media in some samples."""

import torch
from torch import Tensor, nn

from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from tests.cases import LayerCase


def masked(**kwargs: object) -> nn.Module:
    return MaskedCrossAttention(16, media_dim=12, heads=2, head_dim=8, **kwargs)


def gated(attend: Attend, **kwargs: object) -> nn.Module:
    return GatedCrossAttentionBlock(16, heads=2, head_dim=4, mlp_ratio=2, attend=attend, **kwargs)


def open_gates(layer: nn.Module) -> None:
    if isinstance(layer, GatedCrossAttentionBlock):
        nn.init.constant_(layer.attn_gate, 0.7)
        nn.init.constant_(layer.ff_gate, -0.6)


def gated_last(**kwargs: object) -> nn.Module:
    return gated(LastMedium(), **kwargs)


def gated_previous(**kwargs: object) -> nn.Module:
    return gated(AllPrevious(), **kwargs)


def gated_group(**kwargs: object) -> nn.Module:
    return gated(ConsecutiveGroup(), feed_forward_without_media=False, **kwargs)


def gated_last_two(**kwargs: object) -> nn.Module:
    return gated(LastMedia(2), feed_forward_without_media=False, **kwargs)


def interleaved(batch: int, media_dim: int = 16) -> dict[str, Tensor]:
    locations = torch.zeros(batch, 11, dtype=torch.bool)
    locations[:, [2, 5, 6]] = True
    locations[::2, 9] = True
    return {
        "text": torch.randn(batch, 11, 16),
        "media": torch.randn(batch, 3, 5, media_dim),
        "media_locations": locations,
    }


def narrower_media(batch: int) -> dict[str, Tensor]:
    return interleaved(batch, media_dim=12)


def without_locations(batch: int) -> dict[str, Tensor]:
    return {"text": torch.randn(batch, 5, 16), "media": torch.randn(batch, 2, 3, 16)}


def outputs(result: object) -> dict[str, Tensor]:
    assert isinstance(result, Tensor)
    return {"text": result}


PADDED = {"media_mask": "media"}

CASES = [
    LayerCase(
        "MaskedCrossAttention",
        masked,
        narrower_media,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused", "segmented"),
    ),
    LayerCase(
        "GatedCrossAttentionBlock-last",
        gated_last,
        interleaved,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused", "segmented"),
    ),
    LayerCase(
        "GatedCrossAttentionBlock-previous",
        gated_previous,
        interleaved,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused"),
    ),
    LayerCase(
        "GatedCrossAttentionBlock-group",
        gated_group,
        interleaved,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused"),
    ),
    LayerCase(
        "GatedCrossAttentionBlock-last-two",
        gated_last_two,
        interleaved,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused", "segmented"),
    ),
    LayerCase(
        "GatedCrossAttentionBlock-all",
        gated_last,
        without_locations,
        outputs,
        padded=PADDED,
        fill=open_gates,
        impls=("reference", "fused"),
    ),
]
