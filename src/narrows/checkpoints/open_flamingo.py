"""Weights of OpenFlamingo and Otter: every parameter of their resampler and gated blocks has one of ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from narrows.checkpoints.files import read_weights
from narrows.errors import InvalidArgument
from narrows.layers.gated_cross_attention import LAST_MEDIUM, GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import Attend

# Otter's layer is one module with the feed-forward in it, OpenFlamingo's a pair of modules.
_RESAMPLER_NAMES = (
    (r"^(layers\.\d+)\.0\.", r"\1.attn."),
    (r"^(layers\.\d+)\.1\.", r"\1.ff."),
    (r"^(layers\.\d+)\.feed_forward\.", r"\1.ff."),
    (r"^(layers\.\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.", r"\1.attn.\2."),
)
_BLOCK = re.compile(r"\b(?:gated_cross_attn_layers\.(\d+)|(\d+)\.gated_cross_attn_layer)\.(.+)$")
_RESAMPLER = re.compile(r"\bperceiver\.(.+)$")


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
        """What makes a `narrows.Flamingo` of these sizes, beside the language model and the vision encoder."""
        resampler, block = self.resampler, next(iter(self.blocks.values()))
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
    checkpoint: str | Path | Mapping[str, Tensor], *, head_dim: int = 64, attend: Attend = LAST_MEDIUM
) -> OpenFlamingoParts:
    """Resampler and gated blocks of a checkpoint of OpenFlamingo or Otter, with its weights and outputs.

    Args:
        checkpoint: a file (`.pt`, of the weights alone or as training saves them, or `.safetensors`), or a state dict
            of the whole model or of what was trained.
        head_dim: width of a head, which no state dict tells; 64 in every model of theirs.
        attend: `LastMedium()`, or `AllPrevious()` for models built with `only_attend_immediate_media=False`.

    Raises:
        InvalidArgument: a file that does not exist, or weights without resampler or gated blocks.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else read_weights(checkpoint)
    resampler: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, value in state.items():
        if found := _BLOCK.search(name):
            blocks.setdefault(int(found[1] or found[2]), {})[found[3]] = value
        elif found := _RESAMPLER.search(name):
            resampler[found[1]] = value
        else:
            others[name] = value
    if not resampler or not blocks:
        raise InvalidArgument(
            "checkpoint",
            expected="weights named 'perceiver...' and '...gated_cross_attn_layer...'",
            got=f"{len(state)} tensors, the first of them {next(iter(state), 'none')!r}",
            hint="Is it a checkpoint of OpenFlamingo or Otter?",
        )
    return OpenFlamingoParts(
        resampler_of(resampler, head_dim=head_dim),
        {layer: block_of(blocks[layer], head_dim=head_dim, attend=attend) for layer in sorted(blocks)},
        others,
    )


def resampler_of(state: Mapping[str, Tensor], *, head_dim: int = 64) -> PerceiverResampler:
    """The `PerceiverResampler` that has the weights of their `PerceiverResampler` or `OtterPerceiverResampler`.

    Frame embeddings count the frames of a clip, media embeddings the media of a sample (`time_axis`). Without either,
    as in every released model, there is a single time embedding of zeros.

    Their media are `[B, M, F, N, D]`, as ours with frames.

    Raises:
        InvalidArgument: both kinds of embeddings, or names that are not theirs.
    """
    ours: dict[str, Tensor] = dict(state)
    for theirs, name in _RESAMPLER_NAMES:
        ours = {re.sub(theirs, name, key): value for key, value in ours.items()}
    frames, media = ours.pop("frame_embs", None), ours.pop("media_time_embs", None)
    if frames is not None and media is not None:
        raise InvalidArgument("state", expected="frame_embs or media_time_embs or neither", got="both")
    latents, to_q, hidden = (
        _tensor(ours, name) for name in ("latents", "layers.0.attn.to_q.weight", "layers.0.ff.1.weight")
    )
    num_latents, dim = latents.shape
    time = latents.new_zeros(1, dim) if frames is None else frames
    ours["time_embeddings"] = time if media is None else media.squeeze(1)
    resampler = PerceiverResampler(
        dim,
        depth=1 + max(int(key.split(".")[1]) for key in ours if key.startswith("layers.")),
        num_latents=num_latents,
        heads=_heads(to_q, head_dim),
        head_dim=head_dim,
        mlp_ratio=len(hidden) / dim,
        num_time_embeddings=len(ours["time_embeddings"]),
        time_axis="frames" if media is None else "media",
        device=latents.device,
        dtype=latents.dtype,
    )
    _load(resampler, ours)
    return resampler


def block_of(
    state: Mapping[str, Tensor], *, head_dim: int = 64, attend: Attend = LAST_MEDIUM
) -> GatedCrossAttentionBlock:
    """The `GatedCrossAttentionBlock` that has the weights of theirs or of `OtterGatedCrossAttentionBlock`.

    Raises:
        InvalidArgument: names that are not theirs.
    """
    ours = {re.sub(r"^feed_forward\.", "ff.", key): value for key, value in state.items()}
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
    _load(block, ours)
    return block


def _sizes(attention: Any, feed_forward: Any) -> dict[str, Any]:
    inner, dim = attention.to_q.weight.shape
    ratio = feed_forward[1].weight.shape[0] / dim
    return {"heads": attention.heads, "head_dim": inner // attention.heads, "mlp_ratio": ratio}


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise InvalidArgument(
            "state", expected="parameters named as in OpenFlamingo or Otter", got=f"{sorted(state)[:4]}, no {name!r}"
        )
    return state[name]


def _heads(to_q: Tensor, head_dim: int) -> int:
    if len(to_q) % head_dim:
        raise InvalidArgument("head_dim", expected=f"a divisor of the inner width {len(to_q)}", got=head_dim)
    return len(to_q) // head_dim


def _load(module: PerceiverResampler | GatedCrossAttentionBlock, state: Mapping[str, Tensor]) -> None:
    wrong = sorted(set(state) ^ set(module.state_dict()))
    if wrong:
        raise InvalidArgument("state", expected=f"the parameters of a {type(module).__name__}", got=f"also {wrong[:4]}")
    module.load_state_dict(dict(state))
