"""One file per mechanism lists its layers as `CASES`; `tests/layers/test_every_layer.py` runs what every layer promises
over all of them."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCase:
    """A layer and how to call it.

    Args:
        name: shown in test ids.
        construct: makes the layer, small (width at most 32), from `impl`, `device` and `dtype`.
        fill: makes its parameters random in such a way that no output is trivial (gates opened, zero-initialised
            parameters filled).
        inputs: `inputs(batch)` gives float32 keyword arguments for a batch of that size, without masks.
        outputs: the tensors of the layer's result, by name; the first axis of each is the batch.
        padded: for each mask the layer takes: mask argument -> the argument it masks. Token axis is `pad_axis`.
        per_token: names of outputs that have one row per token of the (only) padded argument and must be 0 there.
        pad_axis: axis of the padded argument that its mask speaks of.
        impls: values of `impl=` the layer's constructor takes, "reference" first.
        dynamic: whether the token axis of the first input may change after export.
        random: the layer draws random numbers in eval; tests then pass a fresh generator as `generator`.
    """

    name: str
    construct: Callable[..., nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    outputs: Callable[[object], dict[str, Tensor]]
    padded: Mapping[str, str]
    per_token: tuple[str, ...] = ()
    pad_axis: int = 1
    impls: tuple[str, ...] = ("reference",)
    dynamic: bool = True
    random: bool = False
    fill: Callable[[nn.Module], object] = lambda layer: None

    def build(self, **kwargs: Any) -> nn.Module:
        """The layer with its parameters filled."""
        layer = self.construct(**kwargs)
        self.fill(layer)
        return layer


def all_cases() -> list[LayerCase]:
    """Every case of every file beside this one."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return [case for module in modules for case in module.CASES]
