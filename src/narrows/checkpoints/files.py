"""Weights of other people's checkpoints: read from files, renamed, and put into modules, all of them or none."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
    return weights_in(found, str(path))


def weights_in(checkpoint: Any, where: str = "what was given", *, argument: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors in what a training script saved: under "state_dict", "model" or "model_state_dict", or at the top.

    Raises:
        InvalidArgument: anything but tensors by name.
    """
    for wrapper in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        got = "nothing" if checkpoint == {} else f"a {type(checkpoint).__name__}"
        raise InvalidArgument(argument, expected="tensors by name", got=f"{got} in {where}")
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor):
            got = f"{name!r} of type {type(value).__name__} in {where}"
            raise InvalidArgument(argument, expected="tensors by name", got=got)
    return dict(checkpoint)


class Renamed(dict[str, Tensor]):
    """Weights by their names in narrows; `names` says under which they came.

    Args:
        weights: by the names they have in a checkpoint.
        rules: patterns and what they become, applied to every name one after the other.
        argument: what messages call the checkpoint.

    Raises:
        InvalidArgument: two weights that differ get the same name.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]] = (), *, argument: str = "checkpoint"
    ) -> None:
        super().__init__()
        self.argument, self.names = argument, dict[str, str]()
        for name, value in weights.items():
            ours, theirs = name, weights.names[name] if isinstance(weights, Renamed) else name
            for pattern, replacement in rules:
                ours = re.sub(pattern, replacement, ours)
            if ours in self and not torch.equal(self[ours], value):
                both = f"{self.names[ours]!r} and {theirs!r}, which differ"
                raise InvalidArgument(argument, expected=f"one weight for {ours}", got=both)
            self[ours], self.names[ours] = value, theirs

    def under(self, prefix: str) -> "Renamed":
        """Those whose names begin with `prefix`, without it."""
        inside = {name: value for name, value in self.items() if name.startswith(prefix)}
        found = Renamed({name.removeprefix(prefix): value for name, value in inside.items()}, argument=self.argument)
        found.names = {name.removeprefix(prefix): self.names[name] for name in inside}
        return found


def fill(module: nn.Module, weights: Renamed) -> None:
    """Put a copy of every weight into `module`, with the dtype and the device it has.

    Raises:
        InvalidArgument: names every weight that is missing, left over or of another shape; nothing was put anywhere.
    """
    expected = module.state_dict()
    wrong = [f"no {name}" for name in expected if name not in weights]
    for name, value in weights.items():
        theirs = weights.names.get(name, name)
        if name not in expected:
            wrong.append(f"also {theirs}")
        elif value.shape != expected[name].shape:
            wrong.append(f"{theirs} of shape {tuple(value.shape)} in place of {tuple(expected[name].shape)}")
    if wrong:
        kind = type(module).__name__
        raise InvalidArgument(
            weights.argument, expected=f"the parameters of a {kind}, all of them and no others", got=", ".join(wrong)
        )
    module.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
