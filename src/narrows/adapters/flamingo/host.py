"""The parts of a language model that the adapter needs, found by structure, not by a table of model names."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrows.errors import InvalidArgument, InvalidType
from narrows.precision import accumulation_dtype
from narrows.validation import check_positive

ATTENTION = "attention"


class Host(NamedTuple):
    """A language model that is supported.

    Args:
        model: the causal language model itself, inside whatever wraps it.
        layers: its decoder layers.
        width: of the hidden states between them.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    width: int


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
            expected="a decoder of transformers with keys and values of all its text in past_key_values",
            got=f"{type(model).__name__}, which {reason}",
        )
    config = model.config.get_text_config(decoder=True)
    layers = _decoder_layers(model, config.num_hidden_layers)
    if len(layers) != 1:
        raise InvalidArgument(
            "language_model",
            expected=f"one list of its {config.num_hidden_layers} decoder layers",
            got=f"{type(model).__name__} with {len(layers)} such lists {sorted(layers)}",
        )
    (only,) = layers.values()
    return Host(model, only, config.hidden_size)


def _why_not(model: PreTrainedModel) -> str | None:
    """The reason why a model is not supported, or None."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder: its decoder reads an encoder already"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return "takes no past_key_values: its state is recurrent, or it keeps none"
    config = model.config.get_text_config(decoder=True)
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if getattr(config, "is_decoder", True) is False and not causal:  # some decoders ignore their is_decoder
        return "reads text in both directions: its config says is_decoder=False"
    others = {kind for kind in getattr(config, "layer_types", None) or () if ATTENTION not in kind or "linear" in kind}
    if model._is_stateful or others:
        return f"has a recurrent state{f' in layers {sorted(others)}' if others else ''}, which cannot be cut back"
    return None


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
    return first is not None and first.name == "hidden_states"


def layer_numbers(every: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The decoder layers that get a block."""
    if isinstance(every, int):
        check_positive(every=every)
        numbers = tuple(range(every - 1, num_layers, every))
    else:
        numbers = tuple(sorted(set(every)))
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
    config = getattr(language_model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0
