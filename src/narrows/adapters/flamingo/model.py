"""`Flamingo`: a language model that reads media, without a change to the language model."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.adapters.flamingo.call import MediaCall, run
from narrows.adapters.flamingo.hooks import MediaHooks
from narrows.adapters.flamingo.host import factory, find_host, freeze_modules, layer_numbers
from narrows.adapters.flamingo.media import check_counts, document_starts, encode, locate, no_media, width_of
from narrows.adapters.flamingo.memory import text_length
from narrows.adapters.flamingo.saving import (
    check_made_for,
    decode_policy,
    describe,
    encode_policy,
    load_added,
    save_added,
)
from narrows.errors import InvalidArgument, NarrowsError
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.models.base import SavedWhole
from narrows.ops.media_attention import Attend, LastMedium
from narrows.routing import Routing
from narrows.validation import check_choice, check_not_negative, checked

LAST_MEDIUM = LastMedium()
PLACEMENTS = ("before", "after")


class Flamingo(
    nn.Module,
    SavedWhole,
    ModelHubMixin,
    library_name="narrows",
    license="apache-2.0",
    pipeline_tag="image-text-to-text",
    tags=["narrows", "flamingo"],
):
    r"""A causal language model of transformers that reads images, clips or any encoded media.

    A Perceiver resampler turns each medium into a fixed number of latents; in gated cross attention blocks between the
    decoder layers each text token attends to those of the media it may see (Flamingo, figure 3). The blocks run in
    hooks: class, parameters, state dict and outputs of the language model do not change, and with the gates at zero, as
    at the start, neither do the logits, to the bit. `remove` takes the hooks away. `save_pretrained(folder)` writes
    what was added only; `from_pretrained(folder, language_model=..., vision_encoder=...)` reads it.

    Media are kept with the keys and values of the text, in `past_key_values`, so that cached decoding, later turns with
    new media, chunked prefill, beam search and a cropped cache give what a pass over the whole text gives.

    Args:
        language_model: any decoder of transformers, also inside peft.
        vision_encoder: images `[n, 3, H, W]` to tokens `[n, N, media_dim]`: a module of timm or transformers, or any.
            None: media are passed encoded.
        media_dim: width of encoded media; None: that of the encoder.
        every: a block at every n-th decoder layer, the n-th one first (OpenFlamingo); or the numbers of the layers,
            from 0.
        placement: "before" the decoder layer (paper, OpenFlamingo) or "after" it (flamingo-pytorch).
        attend: which media text may see: `LastMedium()` (paper), `LastMedia(count)`, `ConsecutiveGroup()`,
            `AllPrevious()`.
        media_token_id: the placeholder token of a medium; None: calls pass `media_locations`.
        resampler: further arguments of the `PerceiverResampler`; `depth` is 6 by default.
        block: further arguments of each `GatedCrossAttentionBlock`.
        freeze: no gradients for language model and encoder, which stay in evaluation mode; False leaves them alone.
        device, dtype: of what is added; None: as of the decoder layer beside it.

    Raises:
        InvalidType: no language model of transformers.
        InvalidArgument: an unsupported architecture, with the reason; arguments that do not fit it.

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    @checked
    def __init__(
        self,
        language_model: nn.Module,
        *,
        vision_encoder: nn.Module | None = None,
        media_dim: int | None = None,
        every: int | Sequence[int] = 4,
        placement: str = "before",
        attend: Attend = LAST_MEDIUM,
        media_token_id: int | None = None,
        resampler: Mapping[str, Any] | None = None,
        block: Mapping[str, Any] | None = None,
        freeze: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("placement", placement, PLACEMENTS)
        if media_token_id is not None:
            check_not_negative(media_token_id=media_token_id)
        _check_options("resampler", resampler, PerceiverResampler)
        _check_options("block", block, GatedCrossAttentionBlock)
        host = find_host(language_model)
        media_dim = width_of(vision_encoder) if media_dim is None else media_dim
        if media_dim is None:
            raise InvalidArgument("media_dim", expected="the width of the media's tokens", got=None)
        self.layer_numbers = layer_numbers(every, len(host.layers))
        self.placement, self.attend, self.media_token_id = placement, attend, media_token_id
        self.language_model, self.vision_encoder = language_model, vision_encoder
        factories = [factory(host.layers[number], device, dtype) for number in self.layer_numbers]
        self.resampler = PerceiverResampler(media_dim, **{"depth": 6, **factories[0], **(resampler or {})})
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(host.width, media_dim=media_dim, attend=attend, **factory, **(block or {}))
            for factory in factories
        )
        self._hub_mixin_config = {
            "architecture": type(self).__name__,
            "made_for": describe(host.model),
            "policy": encode_policy(attend),
            "arguments": {
                "media_dim": media_dim,
                "every": list(self.layer_numbers),
                "placement": placement,
                "media_token_id": media_token_id,
                "resampler": dict(resampler or {}),
                "block": dict(block or {}),
            },
        }
        self._unfreeze = freeze_modules(language_model, vision_encoder) if freeze else None
        self._hooks: MediaHooks | None = MediaHooks(
            host, dict(zip(self.layer_numbers, self.blocks, strict=True)), placement=placement, attend=attend
        )
        self.train(language_model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        media: Float[Tensor, "B M *medium"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model returns for this text, its loss included where `labels` are given.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds` among the others. With `past_key_values`, the text that follows.
            media: of the media tokens in this text: images `[B, M, 3, H, W]`, clips `[B, M, F, 3, H, W]` or encoded
                media `[B, M, N, D]` (without an encoder also clips, `[B, M, F, N, D]`). None: the text has none.
            media_mask: `[B, M]`, True at real media, where rows have different numbers of them; or True at the real
                tokens of encoded media.
            media_locations: `[B, T]`, True at media tokens; None: at each `media_token_id`.
            kwargs: everything the language model takes. Documents packed into a row by `position_ids` (no
                `attention_mask`, `use_cache=False`) see their own media only.

        Raises:
            InvalidArgument: media of another shape or width; a row with another number of media than media tokens.
        """
        call = self._call(input_ids, media, media_mask, media_locations, kwargs)
        return run(self._hooks, call, self.language_model, input_ids=input_ids, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        media: Float[Tensor, "B M *medium"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model's `generate` returns, with all its options.

        Takes what `forward` takes; `input_ids` is what `generate` wants, with `past_key_values` the whole text or, with
        the whole text's `attention_mask`, what is new. A media token that the model generates is
        text. Media are encoded once, for any number of beams or samples.
        """
        call = self._call(input_ids, media, media_mask, media_locations, kwargs, whole=True)
        generate: Any = self.language_model.generate
        return run(self._hooks, call, generate, input_ids=input_ids, **kwargs)

    @torch.no_grad()
    def routing(
        self,
        input_ids: Tensor | None = None,
        *,
        media: Float[Tensor, "B M *medium"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> tuple[Routing, ...]:
        """How much each text token reads of each medium: for each block, weights `[B, H, M, T]`.

        Takes what `forward` takes.
        """
        routings: list[Routing] = []
        call = self._call(input_ids, media, media_mask, media_locations, kwargs, routings=routings)
        run(self._hooks, call, self.language_model, input_ids=input_ids, **kwargs)
        return tuple(routings)

    def remove(self) -> nn.Module:
        """Remove the hooks and return the language model as it was: outputs, trainable parameters, mode."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        if self._unfreeze is not None:
            self._unfreeze()
            self._unfreeze = None
        return self.language_model

    def train(self, mode: bool = True) -> "Flamingo":
        """Training mode for what is added; what is frozen stays in evaluation mode.

        Except decoder layers with gradient checkpointing, which transformers does in training mode only.
        """
        super().train(mode)
        if self._unfreeze is not None:
            for module in (self.language_model, self.vision_encoder):
                if module is not None:
                    module.eval()
            for module in self.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = mode
        return self

    def _save_pretrained(self, save_directory: Path) -> None:
        save_added(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        language_model: nn.Module,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> "Flamingo":
        """Constructor arguments given here override saved ones."""
        if config is None or config.get("architecture") != cls.__name__:
            raise InvalidArgument("path", expected="what save_pretrained of a Flamingo wrote", got=model_id)
        if lacking := [key for key in ("made_for", "policy", "arguments") if key not in config]:
            raise InvalidArgument("config.json", expected=f"an entry {lacking[0]!r}", got=f"none in {model_id}")
        check_made_for(find_host(language_model).model, config["made_for"], model_id)
        if config["policy"] is not None:
            arguments = {"attend": decode_policy(config["policy"])} | arguments
        model = cls(language_model, **(config["arguments"] | arguments))
        try:
            load_added(
                model,
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        except BaseException:
            model.remove()
            raise
        return model

    def _call(
        self,
        input_ids: Tensor | None,
        media: Tensor | None,
        media_mask: Tensor | None,
        media_locations: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        whole: bool = False,
        routings: list[Routing] | None = None,
    ) -> MediaCall:
        """The media of a call, encoded, and their places; `whole`: the text may include what is in the cache."""
        if self._hooks is None:
            raise NarrowsError(
                "This Flamingo was removed from its language model. Make another one to read media again."
            )
        text = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if text is None:
            raise InvalidArgument("input_ids", expected="the text, or inputs_embeds", got=None)
        attention_mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        locations, start = locate(text, attention_mask, media_locations, self.media_token_id), text_length(cache)
        if whole:
            begin = 0 if attention_mask is None else attention_mask.shape[1] - text.shape[1]
            locations = locations[:, max(start - begin, 0) :]
        if media is None:
            encoded = no_media(len(text), self.resampler)
        else:
            encoded = encode(media, media_mask, vision_encoder=self.vision_encoder, resampler=self.resampler)
        check_counts(locations, encoded.counts)
        starts = None if whole or start else document_starts(kwargs.get("position_ids"), attention_mask)
        locations = locations.to(encoded.latents.device)
        return MediaCall(encoded.latents, encoded.counts, locations, start, starts, routings)


def _check_options(name: str, options: Mapping[str, Any] | None, layer: type[nn.Module]) -> None:
    known = list(inspect.signature(layer).parameters)
    for option in options or {}:
        if option not in known:
            raise InvalidArgument(name, expected=f"arguments of {layer.__name__}: {', '.join(known)}", got=repr(option))


# The paper's three sizes (Alayrac et al. 2022, tables 1 and 5), as arguments of `Flamingo`, each for a language
# model of Chinchilla's shape and an NFNet-F6, whose feature maps are 1536 wide. The paper's counts of parameters are
# rounded, and its own formulas give slightly others; `docs/flamingo.md` has both.
_RESAMPLER = {"depth": 6, "num_latents": 64, "heads": 16, "head_dim": 96, "activation": "squared_relu"}


def _size(every: int | tuple[int, ...], heads: int) -> dict[str, Any]:
    block = {"heads": heads, "head_dim": 128, "activation": "squared_relu"}
    return {"media_dim": 1536, "every": every, "resampler": dict(_RESAMPLER), "block": block}


PRESETS: dict[str, dict[str, Any]] = {
    "flamingo_3b": _size(1, 16),
    "flamingo_9b": _size(4, 32),
    # Twelve blocks at 80 layers: the first layer counts.
    "flamingo_80b": _size(tuple(range(0, 80, 7)), 64),
}
