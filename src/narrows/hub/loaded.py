"""A vision transformer that was opened, with what is needed to show it images."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from narrows.errors import InvalidArgument


@dataclass(frozen=True)
class Opened:
    """A vision transformer that was opened.

    Args:
        name: what it was asked for by.
        module: the model, in evaluation mode.
        size: `(height, width)` of the images it takes.
        mean: what pixels in [0, 1] are normalised with, by channel.
        std: likewise.
        num_classes: how many logits it gives; 0 for a model that gives features.
        classes: what they are called, in their order; empty where that is not known.
        prepare: turns a PIL image into the `[C, H, W]` that the model takes; None for a model of narrows, whose images
            `narrows.data` prepares.
    """

    name: str
    module: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    prepare: Callable[[Image.Image], Tensor] | None = None

    def picture(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Images as the model takes them, as pictures in [0, 1]."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def outputs(answer: object) -> Float[Tensor, "B width"]:
    """Logits or pooled features, whatever a model wraps them in."""
    for found in (answer, getattr(answer, "logits", None), getattr(answer, "pooler_output", None)):
        if isinstance(found, Tensor):
            return found
    raise InvalidArgument("model", expected="a model that gives logits or pooled features", got=type(answer).__name__)


def read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in one that `torch.load` reads with `weights_only=True`.

    Raises:
        InvalidArgument: no such file, or one that holds anything but weights.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise InvalidArgument("checkpoint", expected="a file with weights", got=f"{str(path)!r}, which is none")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InvalidArgument(
            "checkpoint",
            expected="safetensors, or what torch.load reads with weights_only=True",
            got=f"{str(path)!r}: {str(error).splitlines()[0]}",
        ) from error
    for wrapper in ("state_dict", "model"):  # what training scripts put around weights
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InvalidArgument("checkpoint", expected="tensors by name", got=f"something else in {str(path)!r}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def load_weights(module: nn.Module, weights: dict[str, Tensor], checkpoint: str | Path) -> None:
    """Put weights into a module, all of them and no others.

    Raises:
        InvalidArgument: names or shapes that differ.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        complaint = " ".join(str(error).split())
        raise InvalidArgument(
            "checkpoint",
            expected=f"the weights of a {type(module).__name__} of this size",
            got=f"others in {str(checkpoint)!r} ({complaint[:300]})",
        ) from error
