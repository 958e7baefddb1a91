"""Modules of `flamingo-pytorch`, and those of `open-flamingo` and `otter-ai`, which come from it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged
from narrows.errors import InvalidArgument
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import AllPrevious, Attend, LastMedium, VisibleMedia

_ATTENTION = ("to_q", "to_kv", "to_out")


def perceiver_resampler(module: Any) -> Conversion:
    """Embeddings of media (flamingo-pytorch) count the media of a sample, embeddings of frames those of a medium.

    Where there are neither, as in every model of OpenFlamingo that was released, there is one of zeros that is not
    trained. A layer is a pair of modules or, in Otter, one with both in it.
    """
    frames = getattr(module, "frame_embs", None)
    media_name = "media_pos_emb" if hasattr(module, "media_pos_emb") else "media_time_embs"
    media = getattr(module, media_name)
    if frames is not None and media is not None:
        raise InvalidArgument(
            "module", expected=f"frame_embs or {media_name} or neither", got="both", hint="narrows has one of them."
        )
    if media is not None:
        time = Rearranged((media_name,), lambda embeddings: embeddings.squeeze(1))
    elif frames is not None:
        time = "frame_embs"
    else:
        time = Rearranged(("latents",), lambda latents: latents.new_zeros(1, latents.shape[1]), trained=False)

    modules = {"": "", "layers": "layers", "norm": "norm"}
    for index, layer in enumerate(module.layers):
        is_pair = isinstance(layer, nn.ModuleList)
        attention, feed_forward = (
            f"layers.{index}{name}" for name in ((".0", ".1") if is_pair else ("", ".feed_forward"))
        )
        modules |= {f"layers.{index}": f"layers.{index}", f"layers.{index}.attn": attention}
        for name in ("norm_media", "norm_latents", *_ATTENTION):
            modules[f"layers.{index}.attn.{name}"] = f"{attention}.{name}"
        modules |= _feed_forward(f"layers.{index}.ff", feed_forward)
    first_attention, first_hidden = (module.get_submodule(modules[f"layers.0.{name}"]) for name in ("attn", "ff.1"))
    num_latents, dim = module.latents.shape
    ours = PerceiverResampler(
        dim,
        depth=len(module.layers),
        num_latents=num_latents,
        heads=first_attention.heads,
        head_dim=_head_dim(first_attention),
        mlp_ratio=first_hidden.out_features / dim,
        num_time_embeddings=next((len(learned) for learned in (media, frames) if learned is not None), 1),
        time_axis="frames" if media is None else "media",
    )
    return Conversion(
        ours,
        PerceiverResamplerAsUpstream,
        modules,
        {"latents": "latents", "time_embeddings": time},
        settings={
            f"{modules[f'layers.{index}.attn']}.{name}": value
            for index in range(len(module.layers))
            for name, value in {"heads": first_attention.heads, "scale": _head_dim(first_attention) ** -0.5}.items()
        },
    )


def masked_cross_attention(module: Any) -> Conversion:
    """Names are upstream's."""
    ours = MaskedCrossAttention(module.to_q.in_features, **_arguments(module))
    modules = {name: name for name in ("", "norm", *_ATTENTION)}
    return Conversion(ours, MaskedCrossAttentionAsUpstream, modules, {}, settings={"scale": _head_dim(module) ** -0.5})


def gated_cross_attention_block(module: Any) -> Conversion:
    """Names are upstream's, but for Otter's feed-forward."""
    feed_forward = "ff" if hasattr(module, "ff") else "feed_forward"
    hidden = module.get_submodule(f"{feed_forward}.1").out_features
    dim = module.attn.to_q.in_features
    ours = GatedCrossAttentionBlock(dim, mlp_ratio=hidden / dim, **_arguments(module.attn))
    modules = {"": "", "attn": "attn", **{f"attn.{name}": f"attn.{name}" for name in ("norm", *_ATTENTION)}}
    return Conversion(
        ours,
        GatedCrossAttentionBlockAsUpstream,
        modules | _feed_forward("ff", feed_forward),
        {name: name for name in ("attn_gate", "ff_gate")},
        settings={"attn.scale": _head_dim(module.attn) ** -0.5},
    )


def _feed_forward(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, **{f"{ours}.{index}": f"{theirs}.{index}" for index in range(4)}}


def _head_dim(attention: Any) -> int:
    return attention.to_q.out_features // attention.heads


def _arguments(attention: Any) -> dict[str, Any]:
    return {
        "media_dim": attention.to_kv.in_features,
        "heads": attention.heads,
        "head_dim": _head_dim(attention),
        "attend": LastMedium() if attention.only_attend_immediate_media else AllPrevious(),
    }


class PerceiverResamplerAsUpstream(PerceiverResampler):
    """`PerceiverResampler` that makes latents `[B, 1, K, D]` of `[B, N, D]`, as upstream's does."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Latents `[B, M, K, D]`."""
        return super().forward(x[:, None] if x.ndim == 3 else x)


def _visible(
    attend: Attend, num_tokens: int, locations: Tensor | None, use_cached_media: bool, attend_previous: bool
) -> VisibleMedia | None:
    """What text sees by upstream's arguments.

    Args:
        attend: the last medium, or all before.
        num_tokens: of the text.
        locations: `[B, T]`, True where a medium stands; None: all text sees all media.
        use_cached_media: the text follows after all locations (OpenFlamingo, decoding).
        attend_previous: False: text sees the medium that stands next after it (Otter).
    """
    if locations is None:
        return None
    time = locations.cumsum(-1)
    if use_cached_media:
        time = time[:, -1:].expand(-1, num_tokens)
    elif not attend_previous:
        time = time + ~locations
        time = time.masked_fill(time > locations.sum(-1, keepdim=True), 0)
    return VisibleMedia(time if attend == LastMedium() else torch.ones_like(time), time, attend.most)


class MaskedCrossAttentionAsUpstream(MaskedCrossAttention):
    """`MaskedCrossAttention` that takes what upstream's, OpenFlamingo's and Otter's take."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        attend_previous: bool = True,
    ) -> Tensor:
        """What the text reads."""
        visible = _visible(self.attend, x.shape[1], media_locations, use_cached_media, attend_previous)
        return super().forward(x, media, visible=visible)


class GatedCrossAttentionBlockAsUpstream(GatedCrossAttentionBlock):
    """`GatedCrossAttentionBlock` that takes what upstream's, OpenFlamingo's and Otter's take."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        attend_previous: bool = True,
    ) -> Tensor:
        """Text that has read its media."""
        visible = _visible(self.attn.attend, x.shape[1], media_locations, use_cached_media, attend_previous)
        return super().forward(x, media, visible=visible)


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {
    f"{package}{name}": convert
    for package in (
        "flamingo_pytorch.flamingo_pytorch.",
        "open_flamingo.src.helpers.",
        "otter_ai.models.otter.modeling_otter.Otter",
    )
    for name, convert in {
        "PerceiverResampler": perceiver_resampler,
        "MaskedCrossAttention": masked_cross_attention,
        "GatedCrossAttentionBlock": gated_cross_attention_block,
    }.items()
}
