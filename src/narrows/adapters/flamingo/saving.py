"""Saving and loading of what a `Flamingo` adds to its language model: safetensors and `config.json` in a folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from narrows.errors import InvalidArgument
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from narrows.weights import misfits, read_file, write_safetensors

POLICIES = {policy.__name__: policy for policy in (LastMedium, LastMedia, ConsecutiveGroup, AllPrevious)}
ADDED = ("resampler.", "blocks.")


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


def save_added(model: nn.Module, folder: Path) -> None:
    """Write what was added; if it is sharded, every process has to call this."""
    added = {name: value for name, value in model.state_dict().items() if name.startswith(ADDED)}
    whole = {n: value.full_tensor().cpu() if isinstance(value, DTensor) else value for n, value in added.items()}
    write_safetensors(whole, folder / constants.SAFETENSORS_SINGLE_FILE)


def load_added(model: nn.Module, folder: str, **download: Any) -> None:
    """Read what was added, from a folder or a repository of the Hub.

    Raises:
        InvalidArgument: no weights there, a damaged file, or weights of other parts than `model` has.
    """
    file = Path(folder) / constants.SAFETENSORS_SINGLE_FILE
    if not Path(folder).is_dir():
        file = Path(hf_hub_download(folder, constants.SAFETENSORS_SINGLE_FILE, **download))
    elif not file.is_file():
        raise InvalidArgument("path", expected=f"a folder with {file.name}", got=folder)
    state = read_file(file, argument="path")
    own = {name: value for name, value in model.state_dict().items() if name.startswith(ADDED)}
    if wrong := misfits(own, state, {}):
        raise InvalidArgument(
            "path",
            expected="the weights of this resampler and these blocks",
            got=f"{file} with others: {', '.join(wrong)}",
        )
    model.load_state_dict(state, strict=False)
