"""The parts of a language model that the adapter needs, found by structure, not by a table of model names."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrows.errors import InvalidArgument, InvalidType
from narrows.precision import accumulation_dtype
from narrows.validation import check_positive

ATTENTION = "attention"
CACHES = ("cache", "past_key_values", "cache_params")
"""What language models of transformers call their cache: the first since 5.24, the last those without attention."""
OTHER_STATES = {"state", "mems", "cache", "past_buckets_states"}
HIDDEN_STATES = ("hidden_states", "activations", "x")  # as decoder layers call them


class Host(NamedTuple):
    """A language model that is supported.

    Args:
        model: the causal language model itself, inside whatever wraps it.
        layers: its decoder layers.
        width: of the hidden states between them.
        skipped: numbers of layers that do not run without media of their own (Mllama's).
        cached: whether it takes a cache; otherwise it reads the whole text each time.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    width: int
    skipped: tuple[int, ...]
    cached: bool


def find_host(language_model: nn.Module) -> Host:
    """The causal language model in `language_model` (peft wraps it) and its decoder layers.

    Raises:
        InvalidType: no model of transformers in it.
        InvalidArgument: no decoder layers are found, or the model keeps another state of text than keys and values of
            every token; the message names it and the reason.
    """
    model = next((module for module in language_model.modules() if isinstance(module, PreTrainedModel)), None)
    if model is None:
        raise InvalidType(
            "language_model", expected="a causal language model of transformers", got=type(language_model).__name__
        )
    if (reason := _why_not(model)) is not None:
        raise InvalidArgument(
            "language_model",
            expected="a causal decoder of transformers that keeps its text in a cache of transformers",
            got=f"{type(model).__name__}, which {reason}",
        )
    config = model.config.get_text_config(decoder=True)
    # Some count two attentions of a layer as two.
    counts = [getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")]
    layers = next((found for count in counts if count and (found := _decoder_layers(model, count))), {})
    if len(layers) > 1:
        towers = tuple(f"{name}." for name, part in model.named_modules() if _reads_no_text(part))
        layers = {name: found for name, found in layers.items() if not name.startswith(towers)}
    decoder: Any = model.get_decoder() if len(layers) > 1 else None
    if decoder not in (None, model):
        layers = {name: found for name, found in layers.items() if found in set(decoder.modules())}
    if len(layers) != 1:
        raise InvalidArgument(
            "language_model",
            expected=f"one list of its {counts[0]} decoder layers",
            got=f"{type(model).__name__} with {len(layers)} such lists {sorted(layers)}",
        )
    (only,) = layers.values()
    skipped = tuple(getattr(config, "cross_attention_layers", None) or ())
    return Host(model, only, config.hidden_size, skipped, _takes_cache(model))


def _why_not(model: PreTrainedModel) -> str | None:
    """The reason why a model is not supported, or None."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder: its decoder reads an encoder already"
    takes = inspect.signature(model.forward).parameters
    if (states := OTHER_STATES & set(takes)) and not _takes_cache(model):
        return f"keeps the text before in {states.pop()}, which is no cache of transformers, where its media would be"
    config = model.config.get_text_config(decoder=True)
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    # Decoders that are nothing else ignore their is_decoder; those that can be encoders take an encoder's states.
    if getattr(config, "is_decoder", True) is False and not causal and "encoder_hidden_states" in takes:
        return "reads text in both directions: its config says is_decoder=False"
    return None


def _takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model takes a cache of transformers; `cache` has been a dict of tensors in others."""
    takes = inspect.signature(model.forward).parameters
    return any(name in takes and (name != "cache" or "Cache" in str(takes[name].annotation)) for name in CACHES)


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether a cache of this model cannot be cut back: it holds a state of all text, not one of each token."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return model._is_stateful or any(ATTENTION not in kind or "linear" in kind for kind in kinds)


def _decoder_layers(model: PreTrainedModel, count: int) -> dict[str, nn.ModuleList]:
    """Every outermost list of `count` modules that take hidden states."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not inside
            and all(map(_takes_hidden_states, module))
        ):
            found[name] = module
    return found


def _takes_hidden_states(layer: nn.Module) -> bool:
    """Whether a module, or the only one that it wraps (for activation checkpointing, say), takes hidden states."""
    first = next(iter(inspect.signature(layer.forward).parameters.values()), None)
    if first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL:
        inner = list(layer.children())
        return len(inner) == 1 and _takes_hidden_states(inner[0])
    return first is not None and first.name in HIDDEN_STATES


def _reads_no_text(module: nn.Module) -> bool:
    """Whether a module is a tower for images or sound beside the language model."""
    return isinstance(module, PreTrainedModel) and module.main_input_name in ("pixel_values", "input_features")


def layer_numbers(every: int | Sequence[int], num_layers: int, skipped: Sequence[int] = ()) -> tuple[int, ...]:
    """The decoder layers that get a block: none of those `skipped`."""
    if isinstance(every, int):
        check_positive(every=every)
        numbers = tuple(number for number in range(num_layers) if number not in skipped)[every - 1 :: every]
    else:
        numbers = tuple(sorted(set(every)))
    if never := [number for number in numbers if number in skipped]:
        raise InvalidArgument("every", expected=f"layers that run in text: none of {list(skipped)}", got=never)
    if not numbers or numbers[0] < 0 or numbers[-1] >= num_layers:
        raise InvalidArgument(
            "every", expected=f"a number up to {num_layers}, or some of the layers 0 to {num_layers - 1}", got=every
        )
    return numbers


def factory(
    layer: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, torch.device | str | torch.dtype]:
    """Device and dtype of a block: by default where `layer` computes, and float32, or float64 beside that.

    What trains needs float32: in bfloat16 steps of 1e-4 are lost in the weights, in float16 gradients overflow.
    """
    computes = (p for p in layer.parameters() if p.is_floating_point() and p.element_size() >= 2)
    like = next(computes, torch.empty(0))
    if device is None:
        device = execution_device(layer, like)
    return {"device": device, "dtype": accumulation_dtype(like) if dtype is None else dtype}


def execution_device(module: nn.Module, parameter: Tensor) -> torch.device:
    """Where a module computes: where its `parameter` is, unless accelerate keeps that elsewhere."""
    if not parameter.is_meta:
        return parameter.device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return torch.device("meta")


@dataclass
class Frozen:
    """What was frozen, to be undone; it is copied and pickled with the model.

    Args:
        parameters: those that had gradients.
        modes: of every module, whether it was in training mode.
    """

    parameters: list[nn.Parameter]
    modes: list[tuple[nn.Module, bool]]

    @staticmethod
    def of(*modules: nn.Module | None) -> "Frozen":
        """Freeze modules."""
        known = [module for module in modules if module is not None]
        trained = [parameter for module in known for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        return Frozen(trained, [(part, part.training) for module in known for part in module.modules()])

    def undo(self) -> None:
        """Let them train again, in the modes they had."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for part, mode in self.modes:
            part.training = mode


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by its name in torch, as a configuration or a command line has it."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InvalidArgument("dtype", expected="a floating-point dtype, such as 'bfloat16'", got=repr(dtype))
    return found


def virtual_tokens(language_model: nn.Module) -> int:
    """How many positions a prompt that peft has learned takes before the text."""
    config: Any = getattr(language_model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0
