"""`flamingo_pytorch` modules."""

import re
from typing import Any

from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import AllPrevious, LastMedium


def perceiver_resampler(upstream: Any) -> PerceiverResampler:
    """Upstream's time embeddings count the media of a sample, whatever they are; so do those of the result.

    Upstream's `[B, N, D]` gives latents `[B, 1, K, D]`; ours are `[B, K, D]`.
    """
    parts = {"0": "attn", "1": "ff"}
    state = {
        re.sub(r"^(layers\.\d+)\.([01])", lambda match: f"{match[1]}.{parts[match[2]]}", name): value
        for name, value in upstream.state_dict().items()
    }
    state["time_embeddings"] = state.pop("media_pos_emb").squeeze(1)
    attention, feed_forward = upstream.layers[0]
    num_latents, dim = upstream.latents.shape
    resampler = PerceiverResampler(
        dim,
        depth=len(upstream.layers),
        num_latents=num_latents,
        heads=attention.heads,
        head_dim=attention.to_q.out_features // attention.heads,
        mlp_ratio=feed_forward[1].out_features / dim,
        num_time_embeddings=len(state["time_embeddings"]),
        time_axis="media",
    )
    resampler.load_state_dict(state)
    return resampler


def masked_cross_attention(upstream: Any) -> MaskedCrossAttention:
    """Keys are upstream's."""
    attention = MaskedCrossAttention(upstream.to_q.in_features, **_attention_arguments(upstream))
    attention.load_state_dict(upstream.state_dict())
    return attention


def gated_cross_attention_block(upstream: Any) -> GatedCrossAttentionBlock:
    """Keys are upstream's."""
    dim = upstream.attn.to_q.in_features
    mlp_ratio = upstream.ff[1].out_features / dim
    block = GatedCrossAttentionBlock(dim, mlp_ratio=mlp_ratio, **_attention_arguments(upstream.attn))
    block.load_state_dict(upstream.state_dict())
    return block


def _attention_arguments(attention: Any) -> dict[str, Any]:
    return {
        "media_dim": attention.to_kv.in_features,
        "heads": attention.heads,
        "head_dim": attention.to_q.out_features // attention.heads,
        "attend": LastMedium() if attention.only_attend_immediate_media else AllPrevious(),
    }


CONVERTERS = {
    "flamingo_pytorch.flamingo_pytorch.PerceiverResampler": perceiver_resampler,
    "flamingo_pytorch.flamingo_pytorch.MaskedCrossAttention": masked_cross_attention,
    "flamingo_pytorch.flamingo_pytorch.GatedCrossAttentionBlock": gated_cross_attention_block,
}
