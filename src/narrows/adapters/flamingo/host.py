"""The parts of a language model that the adapter needs, found by structure, not by a table of model names."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from narrows.errors import InvalidArgument, InvalidType
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
    return next(iter(inspect.signature(layer.forward).parameters), None) == "hidden_states"


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
    """Device and dtype of a block: by default those in which `layer` computes, whose weights may be quantised."""
    computes = (p for p in layer.parameters() if p.is_floating_point() and p.element_size() >= 2)
    like = next(computes, torch.empty(0))
    return {"device": like.device if device is None else device, "dtype": like.dtype if dtype is None else dtype}


def freeze_modules(*modules: nn.Module | None) -> Callable[[], None]:
    """Freeze modules; the returned function undoes it."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    modes = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    for parameter in trained:
        parameter.requires_grad_(False)

    def unfreeze() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)
        for part, mode in modes:
            part.training = mode

    return unfreeze
