"""Saving and loading of what a `Flamingo` adds to its language model: safetensors and `config.json` in a folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants, hf_hub_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from narrows.errors import InvalidArgument, MissingExtra
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from narrows.weights import misfits, read_file

POLICIES = {policy.__name__: policy for policy in (LastMedium, LastMedia, ConsecutiveGroup, AllPrevious)}
ADDED = ("resampler.", "blocks.")
ADAPTER_CONFIG = "adapter_config.json"


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The properties of a language model that weights trained beside it depend on."""
    config = model.config.get_text_config(decoder=True)
    return {"model_type": config.model_type, "width": config.hidden_size, "layers": config.num_hidden_layers}


def encode_policy(attend: Attend) -> dict[str, Any] | None:
    """A policy as JSON; None for a user's own class, which has to be passed again on loading."""
    name = type(attend).__name__
    return {"name": name} | asdict(attend) if POLICIES.get(name) is type(attend) else None


def decode_policy(policy: Mapping[str, Any]) -> Attend:
    """The policy that `encode_policy` wrote."""
    return POLICIES[policy["name"]](**{name: value for name, value in policy.items() if name != "name"})


def check_made_for(model: PreTrainedModel, made_for: Mapping[str, Any], folder: str) -> None:
    """Raise unless the weights in `folder` were trained beside a language model of these properties."""
    found = describe(model)
    if found != dict(made_for):
        raise InvalidArgument(
            "language_model", expected=f"one like that {folder} was made for, {dict(made_for)}", got=found
        )


def adapter_of(language_model: nn.Module) -> Any:
    """The configuration of the peft adapter in a language model; None where there is none, or several."""
    configs = next(
        (found for module in language_model.modules() if (found := getattr(module, "peft_config", None))), {}
    )
    return next(iter(configs.values())) if len(configs) == 1 else None


def saved_names(model: Any) -> set[str]:
    """The names of the weights that are saved: what was added, and what trains of the models that it was added to.

    That is what peft or `freeze=False` lets train. Rows of embeddings that train in a frozen model are not ours.
    """
    names = {name for name in model.state_dict() if name.startswith(ADDED)}
    if not model.is_frozen or any(getattr(module, "peft_config", None) for module in model.modules()):
        names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return names


def gathered(state: Mapping[str, Any], names: set[str]) -> dict[str, Tensor]:
    """Weights by name; if they are sharded, every process has to call this."""
    kept = {name: value for name, value in state.items() if name in names}
    return {n: value.full_tensor().cpu() if isinstance(value, DTensor) else value for n, value in kept.items()}


def with_adapter(language_model: nn.Module, folder: str, **download: Any) -> nn.Module:
    """The language model in the peft adapter that was saved in `folder`, unless it is in one already."""
    if any(getattr(module, "peft_config", None) for module in language_model.modules()):
        return language_model
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", extra="peft", purpose="open the adapter of a language model") from error
    file = _file(folder, ADAPTER_CONFIG, download)
    adapted: Any = get_peft_model(cast(Any, language_model), PeftConfig.from_pretrained(str(file.parent)))
    return adapted.train(language_model.training)


def load_added(model: nn.Module, folder: str, *, keep_dtype: bool, **download: Any) -> None:
    """Read what was added, from a folder or a repository of the Hub.

    Args:
        model: the `Flamingo`.
        folder: or repository.
        keep_dtype: whether weights keep the precision of the file, or take that of the model.
        download: of `huggingface_hub`.

    Raises:
        InvalidArgument: no weights there, a damaged file, or weights of other parts than `model` has.
    """
    file = _file(folder, constants.SAFETENSORS_SINGLE_FILE, download)
    state = read_file(file, argument="path")
    own = {_plain(name): value for name, value in model.state_dict(keep_vars=True).items()}
    state = {_plain(name): value for name, value in state.items()}
    expected = {name: value for name, value in own.items() if name.startswith(ADDED) or name in state}
    if wrong := misfits(expected, state, {}):
        raise InvalidArgument(
            "path",
            expected="the weights of this resampler and these blocks",
            got=f"{file} with others: {', '.join(wrong)}",
        )
    with torch.no_grad():
        for name, value in state.items():
            if keep_dtype and name.startswith(ADDED):
                own[name].data = own[name].data.to(value.dtype)
            own[name].copy_(value)


def _plain(name: str) -> str:
    """The name of a weight without what peft puts around a language model."""
    return name.replace("language_model.base_model.model.", "language_model.")


def _file(folder: str, name: str, download: Mapping[str, Any]) -> Path:
    if not Path(folder).is_dir():
        return Path(hf_hub_download(folder, name, **download))
    if not (file := Path(folder) / name).is_file():
        raise InvalidArgument("path", expected=f"a folder with {file.name}", got=folder)
    return file
