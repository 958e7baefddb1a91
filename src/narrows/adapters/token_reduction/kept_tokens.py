"""Kept tokens alone for a vision-language model: shorter prompts, with the positions that the tokens had.

A tower under token reduction still returns its whole grid. Here what follows it, the projector and the language model
of a model of transformers, gets only the tokens that were kept. Nothing of the model is changed: its own
`get_image_features` is called, and what comes out goes in again as `mm_encoder_outputs`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.hosts.base import HostModel
from narrows.adapters.token_reduction.tokens import gather_rows
from narrows.errors import InvalidArgument, InvalidType
from narrows.validation import check_share

_PROJECTORS = ("LlavaMultiModalProjector", "VipLlavaMultiModalProjector")
"""Classes of projectors that map every token by itself: they are given kept tokens alone."""


@dataclass(frozen=True)
class KeptTokens:
    """A prompt without the placeholders of dropped tokens, for `model(**kept.inputs)` or `generate(**kept.inputs)`.

    Args:
        prompt: tensors `[B, L']`: `input_ids`, `attention_mask`, `position_ids`, and others that were given for each
            token; rows are padded at the side where they were (the left if they were not) to one length.
        features: of each image, of all texts in order, the kept tokens as the language model takes them, `[k, D]`.
        kept: of each image, which of its tokens they are, counted from the first that the language model would read.
        others: arguments that are passed on as they came.
        stacked: whether the model takes the features of all images in one tensor.
    """

    prompt: Mapping[str, Tensor]
    features: Sequence[Float[Tensor, "_ D"]]
    kept: Sequence[Int[Tensor, "_"]]
    others: Mapping[str, Any] = field(default_factory=dict)
    stacked: bool = False

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model, or of its `generate`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # A new record each time: with beams, `generate` repeats the features in it.
        features: Any = torch.stack(list(self.features)) if self.stacked else list(self.features)
        encoded: Any = BaseModelOutputWithPooling(pooler_output=features)
        return {**self.others, **self.prompt, "mm_encoder_outputs": {"image": encoded}}

    def next_turn(
        self, sequences: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Tensor]:
        """Arguments of `generate`, beside `past_key_values`, for more text after what was generated.

        Positions go on from the last one of the prompt. A new image needs `kept_tokens` of the whole conversation.

        Args:
            sequences: what `generate` returned and the ids of the new text after it.
            attention_mask: False at padding that stands after the prompt; by default there is none.

        Raises:
            InvalidArgument: sequences that do not begin with the prompt.
        """
        ids, mask, positions = (self.prompt[name] for name in ("input_ids", "attention_mask", "position_ids"))
        width = ids.shape[1]
        if sequences.shape[0] != len(ids) or not torch.equal(sequences[:, :width], ids):
            raise InvalidArgument(
                "sequences",
                expected="the ids that generate returned for `inputs`, which begin with the shortened prompt",
                got=f"shape {tuple(sequences.shape)}, another beginning",
            )
        after = mask.new_ones(len(ids), sequences.shape[1] - width)
        if attention_mask is not None:
            after = attention_mask[:, width:].to(mask)
        steps = positions.amax(1, keepdim=True) + after.cumsum(1)
        return {
            "input_ids": sequences,
            "attention_mask": torch.cat((mask, after), 1),
            "position_ids": torch.cat((positions, steps.to(positions)), 1),
        }


def shorten(
    model: nn.Module, host: HostModel, standing: Callable[[int], Bool[Tensor, "I N"] | None], inputs: Mapping[str, Any]
) -> KeptTokens:
    """Encode the images of a prompt and leave out what the tower dropped; see `Reduction.kept_tokens`.

    Args:
        model: the vision-language model, its tower reduced.
        host: the tower.
        standing: at which positions tokens stand after the block of this number, in the last call of the tower; None if
            nothing was reduced up to there.
        inputs: of the model.
    """
    token = check_prompt(model, inputs)
    read = _last_block_read(model, host)

    def kept() -> Bool[Tensor, "I N"]:
        mask = standing(read)
        if mask is None:
            raise InvalidArgument(
                "budget",
                expected=f"blocks that reduce up to block {read}, the last whose output the language model reads",
                got="none, or a call that was compiled",
            )
        return mask

    projector = next((part for part in model.modules() if type(part).__name__ in _PROJECTORS), None)
    alone = projector is not None and inputs.get("image_sizes") is None
    widths: list[int] = []
    with _narrowed(projector, kept, host.prefix, widths) if alone and projector is not None else nullcontext():
        features, stacked = encode(model, inputs)
    masks = kept()
    if len(masks) != len(features):
        raise _not_one_by_one(f"{len(features)} images whose tower makes {len(masks)}")
    found, rows, stays = [], [], []
    for mask, feature in zip(masks, features, strict=True):
        grid = mask.shape[0] - host.prefix
        count = widths[0] if widths else len(feature)
        if count not in (grid, mask.shape[0]):
            raise _not_one_by_one(f"{count} features of an image, of whose tokens there are {grid}")
        ids = mask[-count:].nonzero()[:, 0]
        rows.append(ids)
        found.append(feature[: len(ids)] if widths else feature[ids])
        stays.append(mask[-count:])
    if stacked and len({len(ids) for ids in rows}) > 1:
        raise InvalidArgument(
            "method",
            expected=f"as many tokens of every image, as {type(model).__name__} reads them in one tensor",
            got=f"{', '.join(str(len(ids)) for ids in rows[:4])} of the first images",
            hint="Take 'topk', say, or give one image at a time.",
        )
    return KeptTokens(without(inputs, torch.cat(stays), token, model), found, rows, _others(inputs), stacked)


def downsample(
    model: nn.Module, share: float, inputs: Mapping[str, Any], *, keep_positions: bool = False
) -> KeptTokens:
    """The baseline that kept tokens have to beat: the grid of features averaged to fewer, as of a smaller image.

    Args:
        model: a vision-language model of transformers, not reduced.
        share: of the tokens; the grid gets the square root of it on each side, rounded.
        inputs: of the model, as `Reduction.kept_tokens` takes them.
        keep_positions: an average stands in the middle of what it is of, and text where it was; otherwise text follows
            without a gap, as after a smaller image.

    Raises:
        InvalidType, InvalidArgument: as `Reduction.kept_tokens`; features that are no square grid.
    """
    token = check_prompt(model, inputs)
    check_share(share=share)
    found, rows, stays = [], [], []
    features, stacked = encode(model, inputs)
    for feature in features:
        side = int(len(feature) ** 0.5)
        if side * side != len(feature):
            raise InvalidArgument("inputs", expected="square grids of features", got=f"{len(feature)} of an image")
        few = max(1, round(side * share**0.5))
        grid = feature.T.unflatten(1, (side, side))[None]
        found.append(F.adaptive_avg_pool2d(grid, few)[0].flatten(1).T)
        middle = (torch.arange(few, device=feature.device) * 2 + 1) * side // (2 * few)
        rows.append((middle[:, None] * side + middle).flatten())
        stays.append(torch.zeros(len(feature), dtype=torch.bool, device=feature.device).index_fill(0, rows[-1], True))
    prompt = without(inputs, torch.cat(stays), token, model)
    if not keep_positions:
        prompt = {**prompt, "position_ids": _positions(prompt["attention_mask"])}
    return KeptTokens(prompt, found, rows, _others(inputs), stacked)


def check_prompt(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The id of the placeholders; raises for models and inputs whose prompts cannot be shortened."""
    config: Any = getattr(model, "config", None)
    token = getattr(config, "image_token_id", None)
    if token is None or not hasattr(model, "get_image_features"):
        raise InvalidType(
            "model",
            expected="reduce_tokens of a vision-language model of transformers as a whole, with get_image_features "
            "and image_token_id",
            got=type(model).__name__,
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise InvalidType("model", expected="one whose forward takes mm_encoder_outputs", got=type(model).__name__)
    if any(hasattr(part, "get_rope_index") for part in model.modules()):
        got = f"{type(model).__name__}, whose positions have several axes"
        raise InvalidType("model", expected="positions of one axis", got=got)
    for name in ("input_ids", "pixel_values"):
        if not isinstance(inputs.get(name), Tensor):
            raise InvalidArgument(name, expected="a tensor", got=type(inputs.get(name)).__name__)
    for name in ("inputs_embeds", "past_key_values", "cache", "mm_encoder_outputs", "pixel_values_videos"):
        if inputs.get(name) is not None:
            raise InvalidArgument(name, expected="none: a whole prompt with its images", got="one")
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if mask is not None and mask.shape != ids.shape:
        raise InvalidArgument("attention_mask", expected=f"[B, L] as input_ids {tuple(ids.shape)}", got=mask.shape)
    return token


def encode(model: Any, inputs: Mapping[str, Any]) -> tuple[Sequence[Float[Tensor, "_ D"]], bool]:
    """What the language model would read of each image, and whether it does in one tensor."""
    takes = inspect.signature(model.base_model.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in takes and value is not None}
    encoded = model.get_image_features(**given, return_dict=True)
    if getattr(encoded, "deepstack_features", None) is not None:
        raise InvalidType("model", expected="features of one depth", got=f"deepstack of {type(model).__name__}")
    return list(encoded.pooler_output), isinstance(encoded.pooler_output, Tensor)


def without(
    inputs: Mapping[str, Any], stays: Bool[Tensor, "n"], token: int, model: nn.Module
) -> dict[str, Int[Tensor, "B K"]]:
    """Everything that was given for each token, without the placeholders that do not stay."""
    ids = inputs["input_ids"]
    placeholders = ids == token
    if (count := int(placeholders.sum())) != len(stays):
        got = f"{count}, for {len(stays)} features"
        raise InvalidArgument("input_ids", expected="one placeholder for each feature of the images", got=got)
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given
    positions = inputs.get("position_ids")
    per_token = {
        name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape
    }
    per_token |= {"attention_mask": mask, "position_ids": _positions(mask) if positions is None else positions}
    per_token["position_ids"] = per_token["position_ids"].expand_as(ids)
    kept = mask.bool().masked_scatter(placeholders, stays.to(ids.device)) & mask.bool()
    right = not bool(mask[:, -1].all())
    lengths = kept.sum(1)
    width = int(lengths.max())
    # Those that stay first or last, in their order.
    order = kept.int().argsort(dim=1, descending=right, stable=True)
    order = order[:, :width] if right else order[:, -width:]
    places = torch.arange(width, device=ids.device)
    real = places < lengths[:, None] if right else places >= width - lengths[:, None]
    config: Any = model.config
    padding = getattr(config, "pad_token_id", None) or getattr(config.get_text_config(), "pad_token_id", None) or 0
    fill = {"input_ids": padding, "labels": -100}
    return {name: gather_rows(value, order).masked_fill(~real, fill.get(name, 0)) for name, value in per_token.items()}


def _positions(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Those that `generate` gives tokens: padding has none."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _others(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither of the images nor of each token."""
    ids = inputs["input_ids"]
    mine = ("pixel_values", "image_sizes", "pixel_attention_mask", "attention_mask", "position_ids")
    return {
        name: value
        for name, value in inputs.items()
        if name not in mine and value is not None and not (isinstance(value, Tensor) and value.shape == ids.shape)
    }


def _last_block_read(model: nn.Module, host: HostModel) -> int:
    """The number of the last block whose output the language model reads."""
    layers: Any = getattr(model.config, "vision_feature_layer", -1)  # pyright: ignore[reportAttributeAccessIssue]
    states = [
        layer if layer >= 0 else host.depth + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)
    ]
    return max(states) - 1


@contextmanager
def _narrowed(
    projector: nn.Module, kept: Callable[[], Bool[Tensor, "I N"]], prefix: int, widths: list[int]
) -> Iterator[None]:
    """The projector is given kept tokens alone, padded to one number; how many there were comes into `widths`."""

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, masks = args[0], kept()
        if tokens.shape[0] != len(masks) or tokens.shape[1] not in (masks.shape[1], masks.shape[1] - prefix):
            return args
        widths.append(tokens.shape[1])
        of_tokens = masks[:, -tokens.shape[1] :]
        order = of_tokens.int().argsort(dim=1, descending=True, stable=True)
        return (gather_rows(tokens, order[:, : int(of_tokens.sum(1).max())]), *args[1:])

    hook = projector.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _not_one_by_one(got: str) -> InvalidType:
    return InvalidType(
        "model",
        expected="a language model that reads one feature for each token of the tower",
        got=got,
        hint="Features that are merged, tiled or shuffled after the tower have no kept tokens of their own.",
    )
