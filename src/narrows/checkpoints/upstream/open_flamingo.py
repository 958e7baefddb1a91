"""Modules of `open-flamingo` and `otter-ai`."""

from typing import Any

from narrows.checkpoints.open_flamingo import block_of, resampler_of
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import AllPrevious, LastMedium


def perceiver_resampler(theirs: Any) -> PerceiverResampler:
    """Their layer is a pair of modules (OpenFlamingo) or one (Otter)."""
    layer = theirs.layers[0]
    attention = layer if hasattr(layer, "to_q") else layer[0]
    return resampler_of(theirs.state_dict(), head_dim=attention.to_q.out_features // attention.heads)


def gated_cross_attention_block(theirs: Any) -> GatedCrossAttentionBlock:
    """Keys are ours, but for Otter's feed-forward."""
    return block_of(
        theirs.state_dict(),
        head_dim=theirs.attn.to_q.out_features // theirs.attn.heads,
        attend=LastMedium() if theirs.attn.only_attend_immediate_media else AllPrevious(),
    )


CONVERTERS = {
    "open_flamingo.src.helpers.PerceiverResampler": perceiver_resampler,
    "open_flamingo.src.helpers.GatedCrossAttentionBlock": gated_cross_attention_block,
    "otter_ai.models.otter.modeling_otter.OtterPerceiverResampler": perceiver_resampler,
    "otter_ai.models.otter.modeling_otter.OtterGatedCrossAttentionBlock": gated_cross_attention_block,
}
