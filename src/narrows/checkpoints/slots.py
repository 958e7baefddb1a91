"""Published object-centric models: slot attention, what stands around it and the decoder, by the names they have."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from narrows.checkpoints.files import Renamed, count_numbered, fill, read_weights, weights_in
from narrows.errors import InvalidArgument
from narrows.layers.initial_slots import GaussianSlots, LearnedSlots
from narrows.layers.slot_attention import NormedSlotAttention, SlotAttention
from narrows.layers.slot_decoders import AutoregressiveDecoder, MLPDecoder
from narrows.layers.slot_mixer import SlotBlock, SlotMixer
from narrows.validation import check_positive

# Their names and ours, applied one after the other. Ours begin with the part: features, slots, decoder, encoder.
_OCLF = (
    (r"^models\.feature_extractor\.(model\.)?", "encoder."),
    (r"^models\.conditioning\.", "slot_init."),
    (r"^models\.perceptual_grouping\.positional_embedding\.layers\.1\.", "slot_attention.feature_transform."),
    (r"^models\.perceptual_grouping\.slot_attention\.", "slot_attention.slot_attention."),
    (r"^models\.object_decoder\.", "decoder."),
)
_DINOSAUR = (
    (r"^slot_attention\.feature_transform\.", "features."),
    (r"^slot_init\.slots_mu$", "slots.initial_slots.mean"),
    (r"^slot_init\.slots_logsigma$", "slots.initial_slots.log_scale"),
    (r"^slot_attention\.slot_attention\.", "slots."),
    (r"^slots\.norm_input\.", "slots.norm_tokens."),
    (r"^slots\.ff_mlp\.module\.0\.", "slots.mlp.norm."),
    (r"^slots\.ff_mlp\.module\.1\.", "slots.mlp.expand."),
    (r"^slots\.ff_mlp\.module\.3\.", "slots.mlp.contract."),
    (r"^decoder\.inp_transform\.", "decoder.slot_map."),
    (r"^decoder\.decoder\.", "decoder.mlp."),
    (r"^decoder\.pos_embed$", "decoder.positions"),
)
_SPOT = (
    (r"^slot_attn\.layer_norm\.", "features.0."),
    (r"^slot_attn\.mlp\.0\.", "features.1."),
    (r"^slot_attn\.mlp\.2\.", "features.3."),
    (r"^slot_attn\.slots_init\.weight$", "slots.initial_slots.slots"),
    (r"^slot_attn\.slot_mu$", "slots.initial_slots.mean"),
    (r"^slot_attn\.slot_log_sigma$", "slots.initial_slots.log_scale"),
    (r"^slot_attn\.slot_attention\.", "slots."),
    (r"^slots\.project_", "slots.to_"),
    (r"^slots\.norm_inputs\.", "slots.norm_tokens."),
    (r"^slots\.norm_mlp\.", "slots.mlp.norm."),
    (r"^slots\.mlp\.0\.", "slots.mlp.expand."),
    (r"^slots\.mlp\.2\.", "slots.mlp.contract."),
    (r"^bos_tokens$", "decoder.first"),
    (r"^input_proj\.0\.", "decoder.input_map."),
    (r"^input_proj\.1\.", "decoder.input_norm."),
    (r"^slot_proj\.0\.", "decoder.slot_map."),
    (r"^slot_proj\.1\.", "decoder.slot_norm."),
    (r"^dec\.layer_norm\.", "decoder.norm."),
    (r"^dec\.decoder\.", "decoder.mlp."),
    (r"^dec\.pos_embed$", "decoder.positions"),
    (r"^dec\.", "decoder."),
    (r"\.self_attn_layer_norm\.", ".norm_self."),
    (r"\.encoder_decoder_attn_layer_norm\.", ".norm_cross."),
    (r"\.ffn_layer_norm\.", ".norm_mlp."),
    (r"\.self_attn\.", ".patches."),
    (r"\.encoder_decoder_attn\.", ".slots."),
    (r"\.proj_o\.", ".to_out."),
    (r"\.proj_([qkv])\.", r".to_\1."),
    (r"\.ffn\.0\.", ".expand."),
    (r"\.ffn\.2\.", ".contract."),
)
_VIDEO = (
    (r"^(encoder|processor|decoder|target_encoder)\.module\.", r"\1."),  # of clips; models of images go without
    (r"^target_encoder\.", "encoder.target_"),
    (r"^encoder\.output_transform\.layers\.", "features."),
    (r"^initializer\.log_std$", "slots.initial_slots.log_scale"),
    (r"^initializer\.", "slots.initial_slots."),
    (r"^processor\.corrector\.", "slots."),
    (r"^slots\.norm_features\.", "slots.norm_tokens."),
    (r"^slots\.mlp\.layers\.0\.", "slots.mlp.norm."),
    (r"^slots\.mlp\.layers\.1\.", "slots.mlp.expand."),
    (r"^slots\.mlp\.layers\.3\.", "slots.mlp.contract."),
    (r"^processor\.predictor\.blocks\.0\.", "predictor."),
    (r"^decoder\.allocator\.blocks\.", "decoder.blocks."),
    (r"^decoder\.renderer\.layers\.", "decoder.mlp."),
    (r"^decoder\.mlp\.layers\.", "decoder.mlp."),
    (r"^decoder\.pos_emb$", "decoder.positions"),
    (r"^decoder\.norm_q\.", "decoder.norm_positions."),
    (r"^decoder\.norm_k\.", "decoder.norm_slots."),
    (r"\.self_attn\.qkv\.", ".to_qkv."),
    (r"\.self_attn\.out_proj\.", ".to_out."),
    (r"\.linear1\.", ".expand."),
    (r"\.linear2\.", ".contract."),
    (r"\.norm1\.", ".norm_attention."),
    (r"\.norm2\.", ".norm_mlp."),
)
_KERAS = (
    (r"/\.ATTRIBUTES/VARIABLE_VALUE$|:0$", ""),
    (r"/", "."),
    (r"^.*?(?=slot_attention\.)", ""),
    (r"^slot_attention\.slots_mu$", "slots.initial_slots.mean"),
    (r"^slot_attention\.slots_log_sigma$", "slots.initial_slots.log_scale"),
    (r"^slot_attention\.", "slots."),
    (r"^slots\.project_", "slots.to_"),
    (r"^slots\.norm_inputs\.", "slots.norm_tokens."),
    (r"^slots\.norm_mlp\.", "slots.mlp.norm."),
    (r"^slots\.mlp\.(layer_with_weights-0|0|dense(_\d*[02468])?)\.", "slots.mlp.expand."),
    (r"^slots\.mlp\.(layer_with_weights-1|1|dense_\d*[13579])\.", "slots.mlp.contract."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)
_MARKS = {
    "SPOT": r"^slot_attn\.slot_attention\.project_q\.weight$",
    "FT-DINOSAUR": r"^slot_attention\.slot_attention\.to_q\.weight$",
    "OCLF": r"^models\.perceptual_grouping\.slot_attention\.to_q\.weight$",
    "Google": r"slot_attention[/.]project_q[/.]kernel",
    "VideoSAUR": r"^processor\.(module\.)?corrector\.to_q\.weight$",
}
_HEADS = {"SPOT": 6, "VideoSAUR": 4}
_KERAS_EPS = 1e-3


class ObjectParts(NamedTuple):
    """The parts of a published object-centric model.

    Args:
        family: "SPOT", "FT-DINOSAUR", "OCLF", "Google", or "VideoSAUR", whose names SlotContrast has too.
        features: what features of the encoder go through before slot attention; empty where a family has nothing.
        slots: slot attention with its initial slots.
        decoder: of features from slots; None where the checkpoint has none of these.
        encoder: weights of the vision encoder, by the names they have there.
        predictor: of the slots of the next frame; None where the checkpoint has none.
    """

    family: str
    features: nn.Sequential
    slots: SlotAttention
    decoder: MLPDecoder | AutoregressiveDecoder | SlotMixer | None
    encoder: dict[str, Tensor]
    predictor: SlotBlock | None = None


def read_objects(
    state: str | Path | Mapping[str, Any],
    *,
    grid: tuple[int, int] | None = None,
    num_slots: int = 7,
    num_iterations: int = 3,
    heads: int | None = None,
    cross_heads: int | None = None,
) -> ObjectParts:
    """Slot attention and decoder of a checkpoint of SPOT, FT-DINOSAUR, OCLF, VideoSAUR, SlotContrast or Google's code.

    Widths and depths are read from shapes. What no state dict tells is an argument; the defaults are those of the
    published models. What the decoder of VideoSAUR gives beyond the features are logits of transitions. Its attention
    multiplies logits by the root of the heads' width where others divide by it; the weights of queries make up for it.

    Args:
        state: their state dict, what holds it under "state_dict" or "model", or a file of either; of Google's code, a
            TensorFlow checkpoint saved as `.npz` by its variables' names.
        grid: `(height, width)` of the patches that an MLP decoder was trained on; a square if None.
        num_slots: of models whose slots are drawn.
        num_iterations: of slot attention, in the first frame of clips; VideoSAUR and SlotContrast take 2 in others.
        heads: of SPOT's transformer, 6 if None, or of VideoSAUR's predictor and slot mixer, 4 if None.
        cross_heads: of its attention to slots, from the second block on.

    Raises:
        InvalidArgument: names of no known family; a weight that is missing, left over or of another shape, by name.

    https://github.com/gkakogeorgiou/spot, https://github.com/rw-ocrl/ftdinosaur-inference,
    https://github.com/martius-lab/videosaur, https://github.com/martius-lab/slotcontrast,
    https://github.com/amazon-science/object-centric-learning-framework,
    https://github.com/google-research/google-research/tree/master/slot_attention
    """
    check_positive(num_slots=num_slots, num_iterations=num_iterations, heads=1 if heads is None else heads)
    given = _weights(state)
    family = next((name for name, mark in _MARKS.items() if any(re.search(mark, key) for key in given)), None)
    if family is None:
        first = ", ".join(list(given)[:3])
        known = ", ".join(_MARKS)
        raise InvalidArgument("state", expected=f"the weights of a model of {known}", got=f"names like {first}")
    if family == "Google":
        return _of_google(given, num_slots, num_iterations)
    rules = {"SPOT": _SPOT, "FT-DINOSAUR": _DINOSAUR, "OCLF": (*_OCLF, *_DINOSAUR), "VideoSAUR": _VIDEO}[family]
    heads = _HEADS.get(family, 1) if heads is None else heads
    # SPOT saves its causal masks as parameters.
    weights = Renamed({k: v for k, v in given.items() if not k.endswith("self_attn_mask")}, rules, argument="state")
    encoder = {name: weights.pop(name) for name in list(weights) if re.match(r"(second_)?encoder\.", name)}
    features, decoder, predictor = (weights.under(f"{part}.") for part in ("features", "decoder", "predictor"))
    unknown = [name for name in weights if not re.match(r"(features|slots|decoder|predictor)\.", name)]
    if unknown:
        names = ", ".join(repr(weights.names[name]) for name in unknown[:3])
        raise InvalidArgument("state", expected=f"the weights of a model of {family}", got=f"also {names}")
    of_video = family == "VideoSAUR"
    slots = _slot_attention(weights.under("slots."), num_slots, num_iterations, of_video=of_video)
    before = _feature_map(features) if features else nn.Sequential()
    made = _decoder(decoder, slots, grid, heads, cross_heads, of_video=of_video) if decoder else None
    vision = {name.partition(".")[2]: value for name, value in encoder.items()}
    if not predictor:
        return ObjectParts(family, before, slots, made, vision)
    _scale_queries(predictor, "", heads)
    block = SlotBlock(slots.to_q.in_features, heads, pre_norm=True)
    fill(block, predictor)
    return ObjectParts(family, before, slots, made, vision, block)


def _weights(state: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) and Path(state).suffix == ".npz":
        try:
            with np.load(state, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (OSError, ValueError) as error:
            raise InvalidArgument("state", expected="arrays by name", got=f"{state}: {error}") from error
    if isinstance(state, Mapping):
        state = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
        return weights_in(state, argument="state")
    return read_weights(state)


def _slot_attention(weights: Renamed, num_slots: int, num_iterations: int, *, of_video: bool = False) -> SlotAttention:
    for name in ("initial_slots.mean", "initial_slots.log_scale"):
        if name in weights:
            weights[name] = weights[name].flatten()
    query, key, hidden = (weights.get(name) for name in ("to_q.weight", "to_k.weight", "mlp.expand.weight"))
    if of_video and not any(name.startswith("mlp.") for name in weights):
        hidden = ()
    if query is None or key is None or hidden is None:
        raise InvalidArgument("state", expected="maps of slot attention and its MLP", got=f"{list(weights)[:5]}")
    slot_dim, learned = query.shape[1], weights.get("initial_slots.slots")
    if learned is not None:
        learned = weights["initial_slots.slots"] = learned.flatten(0, -2)
    start = GaussianSlots(num_slots, slot_dim) if learned is None else LearnedSlots(len(learned), slot_dim)
    layer = (NormedSlotAttention if of_video else SlotAttention)(
        key.shape[1],
        num_iterations=num_iterations,
        slot_dim=slot_dim,
        qkv_bias="to_q.bias" in weights,
        mlp_dim=len(hidden),
        initial_slots=start,
    )
    fill(layer, weights)
    return layer


def _feature_map(weights: Renamed) -> nn.Sequential:
    """LayerNorm, Linear, ReLU, Linear."""
    dim, hidden, out = (len(weights[f"{index}.bias"]) if f"{index}.bias" in weights else 1 for index in (0, 1, 3))
    made = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
    fill(made, weights)
    return made


def _scale_queries(weights: Renamed, prefix: str, heads: int) -> None:
    """Give queries the factor d that makes d^-1/2 q k of what was d^1/2 q k, where heads are d wide."""
    for name in (f"{prefix}to_qkv.weight", f"{prefix}to_qkv.bias"):
        if name in weights:
            width = len(weights[name]) // 3
            factor = torch.ones(len(weights[name]), dtype=weights[name].dtype)
            factor[:width] = width / heads
            weights[name] = weights[name] * factor.view(-1, *[1] * (weights[name].ndim - 1))


def _grid(positions: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = round(len(positions) ** 0.5)
    grid = (side, side) if grid is None else grid
    if grid[0] * grid[1] != len(positions):
        raise InvalidArgument("grid", expected=f"a grid of the {len(positions)} positions", got=grid)
    return grid


def _mixer(weights: Renamed, slot_dim: int, grid: tuple[int, int] | None, heads: int) -> SlotMixer:
    numbers = sorted(int(name.split(".")[1]) for name in weights if re.fullmatch(r"mlp\.\d+\.bias", name))
    last = numbers[-1] + 2 if numbers else 0
    for part in ("weight", "bias"):
        name = f"output_transform.{part}"
        if name in weights:
            weights[f"mlp.{last}.{part}"], weights.names[f"mlp.{last}.{part}"] = weights.pop(name), weights.names[name]
    positions = weights.get("positions")
    bias = weights.get(f"mlp.{last}.bias")
    if positions is None or bias is None or not numbers:
        raise InvalidArgument("state", expected="positions, a renderer and an output", got=f"{list(weights)[:5]}")
    positions = weights["positions"] = positions.flatten(0, -2)
    depth = count_numbered(weights, r"^blocks\.(\d+)\.", argument="state")
    for index in range(depth):
        _scale_queries(weights, f"blocks.{index}.", heads)
    made = SlotMixer(
        slot_dim,
        len(bias),
        grid=_grid(positions, grid),
        depth=depth,
        heads=heads,
        hidden_dims=[len(weights[f"mlp.{number}.bias"]) for number in numbers],
    )
    fill(made, weights)
    return made


def _decoder(
    weights: Renamed,
    slots: SlotAttention,
    grid: tuple[int, int] | None,
    heads: int,
    cross_heads: int | None,
    *,
    of_video: bool,
) -> MLPDecoder | AutoregressiveDecoder | SlotMixer:
    slot_dim = slots.to_q.in_features
    if of_video and any(name.startswith("blocks.") for name in weights):
        return _mixer(weights, slot_dim, grid, heads)
    if any(name.startswith("blocks.") for name in weights):
        if "first" in weights:
            weights["first"] = weights["first"].flatten(0, -2)
        made: MLPDecoder | AutoregressiveDecoder = AutoregressiveDecoder(
            slot_dim,
            len(weights["norm.weight"]) if "norm.weight" in weights else 1,
            depth=count_numbered(weights, r"^blocks\.(\d+)\.", argument="state"),
            heads=heads,
            num_orders=len(weights["first"]) if "first" in weights else 1,
            cross_heads=cross_heads,
        )
        fill(made, weights)
        return made
    for name in ("first", "input_map.weight", "input_norm.weight", "input_norm.bias"):
        weights.pop(name, None)  # SPOT keeps them beside an MLP decoder too, which does not use them
    positions = weights.get("positions")
    numbers = sorted(int(name.split(".")[1]) for name in weights if re.fullmatch(r"mlp\.\d+\.bias", name))
    if positions is None or not numbers:
        raise InvalidArgument("state", expected="positions and an MLP of the decoder", got=f"{list(weights)[:5]}")
    positions = weights["positions"] = positions.flatten(0, -2)
    widths = [len(weights[f"mlp.{number}.bias"]) for number in numbers]
    mapped = "slot_map.weight" in weights
    made = MLPDecoder(
        slot_dim,
        widths[-1] - 1,
        grid=_grid(positions, grid),
        hidden_dims=widths[:-1],
        input_dim=positions.shape[1] if mapped else None,
    )
    if mapped and "slot_map.bias" not in weights:
        raise InvalidArgument(
            "state", expected="slots mapped as in OCLF", got="SPOT's MLP decoder with a slot projection"
        )
    fill(made, weights)
    return made


def _of_google(given: Mapping[str, Tensor], num_slots: int, num_iterations: int) -> ObjectParts:
    """Keras keeps maps as `[in, out]`, gates in the order z, r, h, and its LayerNorms have an epsilon of 1e-3."""
    inside = {name: value for name, value in given.items() if re.search(r"slot_attention[/.]", name)}
    named = Renamed({k: v for k, v in inside.items() if "OPTIMIZER_SLOT" not in k}, _KERAS, argument="state")
    weights = Renamed({}, argument="state")
    for name, value in named.items():
        ours, theirs = name.removeprefix("slots."), named.names[name]
        if ours.startswith("gru."):
            continue
        if ours.endswith(".kernel"):
            ours, value = ours.removesuffix("kernel") + "weight", value.mT
        weights[ours], weights.names[ours] = value.contiguous(), theirs
    gates = {part: named.get(f"slots.gru.{part}") for part in ("kernel", "recurrent_kernel", "bias")}
    for part, target in (("kernel", "weight_ih"), ("recurrent_kernel", "weight_hh")):
        if (value := gates[part]) is not None:
            weights[f"gru.{target}"] = _reordered(value.mT)
    if (bias := gates["bias"]) is not None:
        both = bias if bias.ndim == 2 else torch.stack((bias, torch.zeros_like(bias)))
        weights["gru.bias_ih"], weights["gru.bias_hh"] = (_reordered(part) for part in both)
    for name in ("gru.weight_ih", "gru.weight_hh", "gru.bias_ih", "gru.bias_hh"):
        weights.names.setdefault(name, name)
    slots = _slot_attention(weights, num_slots, num_iterations)
    for norm in slots.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = _KERAS_EPS
    return ObjectParts("Google", nn.Sequential(), slots, None, {})


def _reordered(gates: Tensor) -> Tensor:
    """Gates z, r, h of Keras in the order r, z, n of torch."""
    update, reset, new = gates.chunk(3)
    return torch.cat((reset, update, new)).contiguous()
