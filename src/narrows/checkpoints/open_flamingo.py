"""Weights of OpenFlamingo and Otter: every parameter of their resampler and gated blocks has one of ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from narrows.checkpoints.files import Renamed, count_numbered, fill, read_weights, weights_in
from narrows.errors import InvalidArgument
from narrows.layers.gated_cross_attention import LAST_MEDIUM, GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import Attend

_DIGITS = 5
"""How many digits the number of a decoder layer may have."""

# Otter's layer is one module with the feed-forward in it, OpenFlamingo's a pair of modules.
_RESAMPLER_NAMES = (
    (r"^(layers\.\d+)\.0\.", r"\1.attn."),
    (r"^(layers\.\d+)\.1\.", r"\1.ff."),
    (r"^(layers\.\d+)\.feed_forward\.", r"\1.ff."),
    (r"^(layers\.\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.", r"\1.attn.\2."),
)
# Their modules in the whole model. Each block is in it under two names.
_MODEL_NAMES = (
    (r"^.*\bgated_cross_attn_layers\.(\d+)\.", r"narrows.blocks.\1."),
    (r"^.*\b(\d+)\.gated_cross_attn_layer\.", r"narrows.blocks.\1."),
    (r"^(?:.*\.)?perceiver\.", "narrows.resampler."),
)


class OpenFlamingoParts(NamedTuple):
    """What a checkpoint of OpenFlamingo or Otter adds to its language model.

    Args:
        resampler: reads the vision encoder's features.
        blocks: by the number of the decoder layer each stands before, counted from 0.
        others: every other tensor under its own name; among them are the embeddings, with rows for the new tokens.
    """

    resampler: PerceiverResampler
    blocks: dict[int, GatedCrossAttentionBlock]
    others: dict[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """What makes a `narrows.Flamingo` of these sizes, beside the language model and the vision encoder.

        Raises:
            InvalidArgument: blocks of different sizes, which a `Flamingo` does not have.
        """
        resampler, block = self.resampler, next(iter(self.blocks.values()))
        sizes = {layer: _sizes(each.attn, each.ff) for layer, each in self.blocks.items()}
        if any(each != sizes[next(iter(sizes))] for each in sizes.values()):
            raise InvalidArgument("checkpoint", expected="gated blocks of one size", got=sizes)
        return {
            "media_dim": resampler.dim,
            "every": list(self.blocks),
            "attend": block.attn.attend,
            "resampler": {
                "depth": len(resampler.layers),
                "num_latents": len(resampler.latents),
                "num_time_embeddings": len(resampler.time_embeddings),
                "time_axis": resampler.time_axis,
                **_sizes(resampler.get_submodule("layers.0.attn"), resampler.get_submodule("layers.0.ff")),
            },
            "block": _sizes(block.attn, block.ff),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of that `Flamingo`: `load_state_dict(..., strict=False)` takes them."""
        blocks = {
            f"blocks.{index}.{name}": value
            for index, block in enumerate(self.blocks.values())
            for name, value in block.state_dict().items()
        }
        return {f"resampler.{name}": value for name, value in self.resampler.state_dict().items()} | blocks


def read_open_flamingo(
    checkpoint: str | Path | Mapping[str, Any], *, head_dim: int = 64, attend: Attend = LAST_MEDIUM
) -> OpenFlamingoParts:
    """Resampler and gated blocks of a checkpoint of OpenFlamingo or Otter, with its weights and outputs.

    Args:
        checkpoint: a file (`.pt` or `.safetensors`) or what is in it: the state dict of the whole model or of what was
            trained, alone or as training saves it.
        head_dim: width of a head, which no state dict tells; 64 in every model of theirs.
        attend: `LastMedium()`, or `AllPrevious()` for models built with `only_attend_immediate_media=False`.

    Raises:
        InvalidArgument: a file that does not exist, weights without resampler or gated blocks, or with other parts than
            theirs; the message names each.
    """
    given = weights_in(checkpoint) if isinstance(checkpoint, Mapping) else read_weights(checkpoint)
    state = Renamed(given, _MODEL_NAMES)
    resampler = state.under("narrows.resampler.")
    numbers = {found[1] for name in state if (found := re.match(r"narrows\.blocks\.(\d+)\.", name))}
    if far := [number for number in numbers if len(number) > _DIGITS]:
        raise InvalidArgument("checkpoint", expected="numbers of decoder layers", got=f"a layer {far[0][:20]}...")
    layers = {int(number) for number in numbers}
    if not resampler or not layers:
        raise InvalidArgument(
            "checkpoint",
            expected="weights named 'perceiver...' and '...gated_cross_attn_layer...'",
            got=f"{len(given)} tensors, the first of them {next(iter(given))!r}",
            hint="Is it a checkpoint of OpenFlamingo or Otter?",
        )
    blocks = {layer: state.under(f"narrows.blocks.{layer}.") for layer in sorted(layers)}
    return OpenFlamingoParts(
        resampler_of(resampler, head_dim=head_dim),
        {layer: block_of(weights, head_dim=head_dim, attend=attend) for layer, weights in blocks.items()},
        {name: value for name, value in state.items() if name == state.names[name]},
    )


def resampler_of(state: Mapping[str, Tensor], *, head_dim: int = 64) -> PerceiverResampler:
    """The `PerceiverResampler` that has the weights of their `PerceiverResampler` or `OtterPerceiverResampler`.

    Frame embeddings count the frames of a clip, media embeddings the media of a sample (`time_axis`). Without either,
    as in every released model, there is a single time embedding of zeros.

    Their media are `[B, M, F, N, D]`, as ours with frames.

    Raises:
        InvalidArgument: both kinds of embeddings, or names or shapes that are not theirs.
    """
    ours = Renamed(state, _RESAMPLER_NAMES, argument="checkpoint" if isinstance(state, Renamed) else "state")
    frames, media = ours.pop("frame_embs", None), ours.pop("media_time_embs", None)
    if frames is not None and media is not None:
        raise InvalidArgument(ours.argument, expected="frame_embs or media_time_embs or neither", got="both")
    latents, to_q, hidden = (
        _tensor(ours, name) for name in ("latents", "layers.0.attn.to_q.weight", "layers.0.ff.1.weight")
    )
    num_latents, dim = latents.shape
    time = latents.new_zeros(1, dim) if frames is None else frames
    ours["time_embeddings"] = time if media is None else media.squeeze(1)
    resampler = PerceiverResampler(
        dim,
        depth=count_numbered(ours, r"^layers\.(\d+)\.", argument=ours.argument),
        num_latents=num_latents,
        heads=_heads(to_q, head_dim),
        head_dim=head_dim,
        mlp_ratio=len(hidden) / dim,
        num_time_embeddings=len(ours["time_embeddings"]),
        time_axis="frames" if media is None else "media",
        device=latents.device,
        dtype=latents.dtype,
    )
    fill(resampler, ours)
    return resampler


def block_of(
    state: Mapping[str, Tensor], *, head_dim: int = 64, attend: Attend = LAST_MEDIUM
) -> GatedCrossAttentionBlock:
    """The `GatedCrossAttentionBlock` that has the weights of theirs or of `OtterGatedCrossAttentionBlock`.

    Raises:
        InvalidArgument: names or shapes that are not theirs.
    """
    argument = "checkpoint" if isinstance(state, Renamed) else "state"
    ours = Renamed(state, [(r"^feed_forward\.", "ff.")], argument=argument)
    to_q, to_kv, hidden = (_tensor(ours, f"{name}.weight") for name in ("attn.to_q", "attn.to_kv", "ff.1"))
    dim = to_q.shape[1]
    block = GatedCrossAttentionBlock(
        dim,
        media_dim=to_kv.shape[1],
        heads=_heads(to_q, head_dim),
        head_dim=head_dim,
        attend=attend,
        mlp_ratio=len(hidden) / dim,
        device=to_q.device,
        dtype=to_q.dtype,
    )
    fill(block, ours)
    return block


def _sizes(attention: Any, feed_forward: Any) -> dict[str, Any]:
    inner, dim = attention.to_q.weight.shape
    ratio = feed_forward[1].weight.shape[0] / dim
    return {"heads": attention.heads, "head_dim": inner // attention.heads, "mlp_ratio": ratio}


def _tensor(state: Renamed, name: str) -> Tensor:
    """A matrix that sizes are read from."""
    if name not in state or state[name].ndim != 2:
        got = f"no {name!r}" if name not in state else f"{state.names[name]} of shape {tuple(state[name].shape)}"
        raise InvalidArgument(
            state.argument,
            expected="parameters named as in OpenFlamingo or Otter",
            got=f"{got}, beside {sorted(state.names.values())[:4]}",
        )
    return state[name]


def _heads(to_q: Tensor, head_dim: int) -> int:
    if len(to_q) % head_dim:
        raise InvalidArgument("head_dim", expected=f"a divisor of the inner width {len(to_q)}", got=head_dim)
    return len(to_q) // head_dim
