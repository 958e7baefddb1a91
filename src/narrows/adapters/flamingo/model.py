"""`Flamingo`: a language model that reads media, without a change to the language model."""

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from narrows.adapters.flamingo.base import PretrainedAddition
from narrows.adapters.flamingo.call import MediaCall, run
from narrows.adapters.flamingo.hooks import MediaHooks
from narrows.adapters.flamingo.host import (
    Frozen,
    as_dtype,
    factory,
    find_host,
    has_recurrent_state,
    layer_numbers,
    virtual_tokens,
)
from narrows.adapters.flamingo.media import (
    check_counts,
    document_starts,
    encode,
    locate,
    no_media,
    stack_media,
    width_of,
)
from narrows.adapters.flamingo.memory import cache_of, text_length
from narrows.adapters.flamingo.saving import (
    check_made_for,
    decode_policy,
    describe,
    encode_policy,
    load_added,
    with_adapter,
)
from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.ops.media_attention import Attend, LastMedium
from narrows.routing import Routing
from narrows.validation import check_choice, check_not_negative, checked

LAST_MEDIUM = LastMedium()
PLACEMENTS = ("before", "after")
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
Media = Float[Tensor, "B M *medium"] | Sequence[Tensor | Sequence[Tensor]]


class Flamingo(
    PretrainedAddition,
    library_name="narrows",
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
        device: of what is added; None: where the decoder layer beside it computes.
        dtype: of what is added, as "bfloat16" or `torch.bfloat16`; None: float32, whatever that of the language model.

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
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if any(isinstance(module, Flamingo) for module in language_model.modules()):
            raise InvalidArgument(
                "language_model",
                expected="a language model that no Flamingo is made of",
                got=type(language_model).__name__,
                hint="Make both of the same language model: a call of one reads its own media alone.",
            )
        host = find_host(language_model)
        super().__init__(host.model)
        check_choice("placement", placement, PLACEMENTS)
        if media_token_id is not None:
            check_not_negative(media_token_id=media_token_id)
        _check_options("resampler", resampler, PerceiverResampler)
        _check_options("block", block, GatedCrossAttentionBlock)
        media_dim = width_of(vision_encoder) if media_dim is None else media_dim
        if media_dim is None:
            raise InvalidArgument("media_dim", expected="the width of the media's tokens", got=None)
        self.layer_numbers = layer_numbers(every, len(host.layers), host.skipped)
        self._recurrent = has_recurrent_state(host.model)
        self.placement, self.attend, self.media_token_id = placement, attend, media_token_id
        self.language_model, self.vision_encoder = language_model, vision_encoder
        kind = as_dtype(dtype)
        factories = [factory(host.layers[number], device, kind) for number in self.layer_numbers]
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
        self._frozen = Frozen.of(language_model, vision_encoder) if freeze else None
        self._hooks: MediaHooks | None = MediaHooks(
            host, dict(zip(self.layer_numbers, self.blocks, strict=True)), placement=placement, attend=attend
        )
        self.train(language_model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        media: Media | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model returns for this text, its loss included where `labels` are given.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds` among the others. With `past_key_values`, the text that follows.
            attention_mask, labels: as the language model takes them.
            media: of the media tokens in this text: images `[B, M, 3, H, W]`, clips `[B, M, F, 3, H, W]` or encoded
                media `[B, M, N, D]` (without an encoder also clips, `[B, M, F, N, D]`). A list has the media of each
                row, `[M, ...]` or a list again; they may differ in number, frames and tokens. None: the text has none.
            media_mask: `[B, M]`, True at real media, where rows have different numbers of them; `[B, M, F]`, True at
                the real frames of clips; or True at the real tokens of encoded media. None for lists.
            media_locations: `[B, T]`, True at media tokens; None: at each `media_token_id`.
            kwargs: everything the language model takes. Documents packed into a row by `position_ids` (no
                `attention_mask`, `use_cache=False`) see their own media only.

        Raises:
            InvalidArgument: media of another shape or width; a row with another number of media than media tokens.
        """
        given = {"attention_mask": attention_mask, "labels": labels}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        call = self._call(input_ids, media, media_mask, media_locations, kwargs)
        return run(self._hooks, call, self.language_model, input_ids=input_ids, **kwargs)

    @property
    def base_model(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The last hidden states in place of logits; called with what `forward` takes, but for `labels`.

        Trainers that go through the head themselves, in pieces, ask for it: TRL's.
        """
        return self._hidden_states

    def _hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        media: Media | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> Any:
        if virtual_tokens(self.language_model):
            raise InvalidArgument(
                "language_model",
                expected="no prompt of peft where hidden states are asked for, which would be those without it",
                got=type(self.language_model).__name__,
            )
        kwargs |= {} if attention_mask is None else {"attention_mask": attention_mask}
        call = self._call(input_ids, media, media_mask, media_locations, kwargs)
        backbone = find_host(self.language_model).model.base_model
        assert self._hooks is not None
        return run(self._hooks, call, self._hooks.headless, backbone, input_ids=input_ids, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        media: Media | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        media_locations: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model's `generate` returns, with all its options.

        Takes what `forward` takes; `input_ids` is what `generate` wants, with `past_key_values` the whole text or, with
        the whole text's `attention_mask`, what is new. A media token that the model generates is text. Media are
        encoded once, for any number of beams or samples. With `guidance_scale` the unconditional text
        (`negative_prompt_ids`) reads `negative_media`, by default none; guidance comes behind other logits processors.

        Raises:
            InvalidArgument: as `forward`; `cache_implementation="paged"`.
        """
        if kwargs.get("cache_implementation") == "paged":
            raise InvalidArgument(
                "cache_implementation",
                expected="a cache that is read where it is called",
                got="'paged': texts of several calls are packed and read in another thread, which knows no media",
                hint="Leave it out, or say 'dynamic' or 'static'.",
            )
        config = kwargs.get("generation_config") or self.generation_config
        drafts = [name for name in DRAFTS if kwargs.get(name, getattr(config, name, None)) is not None]
        if drafts and self._recurrent:
            raise InvalidArgument(
                drafts[0],
                expected="None: drafts that are rejected are cut from the cache",
                got=f"drafts for {type(self.language_model).__name__}, whose recurrent state cannot be cut back",
            )
        call = self._call(input_ids, media, media_mask, media_locations, kwargs, generates=True)
        kwargs = self._guided(kwargs)
        generate: Any = self.language_model.generate
        return run(self._hooks, call, generate, input_ids=input_ids, **kwargs)

    @torch.no_grad()
    def routing(
        self,
        input_ids: Tensor | None = None,
        *,
        media: Media | None = None,
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
        if self._frozen is not None:
            self._frozen.undo()
            self._frozen = None
        return self.language_model

    def train(self, mode: bool = True) -> "Flamingo":
        """Training mode for what is added; what is frozen stays in evaluation mode.

        Except decoder layers with gradient checkpointing, which transformers does in training mode only.
        """
        super().train(mode)
        if self._frozen is not None:
            for module in (self.language_model, self.vision_encoder):
                if module is not None:
                    module.eval()
            for module in self.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = mode
        return self

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
        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        if config.get("adapter"):
            language_model = with_adapter(language_model, model_id, **download)
        model = cls(language_model, **(config["arguments"] | arguments))
        try:
            load_added(model, model_id, keep_dtype=arguments.get("dtype") is None, **download)
        except BaseException:
            model.remove()
            raise
        return model

    def _guided(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with guidance whose unconditional branch is a call of its own, with its own media."""
        media = kwargs.pop("negative_media", None)
        config = kwargs.get("generation_config") or self.generation_config
        scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale in (None, 1):
            return kwargs

        def unconditional(input_ids: Tensor, **given: Any) -> Any:
            reads = None if cache_of(given) is not None else media
            places = torch.zeros_like(input_ids, dtype=torch.bool) if reads is None else None
            return self(input_ids, media=reads, media_locations=places, **given)

        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            scale,
            unconditional,
            unconditional_ids=kwargs.pop("negative_prompt_ids", None),
            unconditional_attention_mask=kwargs.pop("negative_prompt_attention_mask", None),
            use_cache=kwargs.get("use_cache", getattr(config, "use_cache", None)) is not False,
        )
        kwargs["logits_processor"] = LogitsProcessorList([guidance, *(kwargs.get("logits_processor") or ())])
        if kwargs.get("generation_config") is None:
            return kwargs | {"guidance_scale": None}
        config: Any = copy(config)
        config.guidance_scale = None
        return {name: value for name, value in kwargs.items() if name != "guidance_scale"} | {
            "generation_config": config
        }

    def _call(
        self,
        input_ids: Tensor | None,
        media: Media | None,
        media_mask: Tensor | None,
        media_locations: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        generates: bool = False,
        routings: list[Routing] | None = None,
    ) -> MediaCall:
        """The media of a call, encoded, and their places; `generates`: the text may include what is in the cache."""
        if self._hooks is None:
            raise NarrowsError(
                "This Flamingo was removed from its language model. Make another one to read media again."
            )
        if not torch.compiler.is_compiling():
            self._hooks.follow_layers()
        text = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if text is None:
            raise InvalidArgument("input_ids", expected="the text, or inputs_embeds", got=None)
        attention_mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
        locations, start = locate(text, attention_mask, media_locations, self.media_token_id), text_length(cache)
        virtual = virtual_tokens(self.language_model)
        if generates:
            begin = 0 if attention_mask is None else attention_mask.shape[1] - text.shape[1]
            locations = locations[:, max(start - virtual - begin, 0) :]
        if isinstance(media, list | tuple):
            media, media_mask = stack_media(media, media_mask)
        if media is not None and not isinstance(media, Tensor):
            raise InvalidType("media", expected="a tensor, or a list of each row's media", got=type(media).__name__)
        if media is None:
            encoded = no_media(len(text), self.resampler)
        else:
            encoded = encode(media, media_mask, vision_encoder=self.vision_encoder, resampler=self.resampler)
        check_counts(locations, encoded.counts)
        starts = None if generates or start else document_starts(kwargs.get("position_ids"), attention_mask)
        locations = locations.to(encoded.latents.device)
        return MediaCall(
            encoded.latents,
            encoded.counts,
            locations,
            start,
            whole=not generates,
            virtual=0 if start else virtual,
            document_starts=starts,
            routings=routings,
        )


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
