"""Files with weights."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from narrows.errors import InvalidArgument

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts save the weights, beside optimizer and epoch."""


def read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in one that `torch.load` reads with `weights_only=True`.

    Weights that a training script saved under "state_dict", "model" or "model_state_dict" are found there.

    Raises:
        InvalidArgument: no such file, or one that holds anything but weights.
    """
    path = Path(checkpoint)
    if not path.is_file():
        got = f"{str(path)!r}, which {'is a folder' if path.is_dir() else 'does not exist'}"
        raise InvalidArgument("checkpoint", expected="a file with weights", got=got)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InvalidArgument(
            "checkpoint",
            expected="safetensors, or what torch.load reads with weights_only=True",
            got=f"{str(path)!r}: {str(error).splitlines()[0]}",
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InvalidArgument("checkpoint", expected="tensors by name", got=f"something else in {str(path)!r}")
    return found
