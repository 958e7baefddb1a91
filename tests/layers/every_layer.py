"""How the tests of every layer build a case and call it."""

import pytest
import torch
from torch import Tensor, nn

from tests.cases import LayerCase, all_cases

CASES = all_cases()

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_implementation = pytest.mark.parametrize(
    ("case", "impl"),
    [(case, impl) for case in CASES for impl in case.impls],
    ids=lambda value: value.name if isinstance(value, LayerCase) else value,
)


def build(case: LayerCase, *, seed: int = 0, **kwargs: object) -> nn.Module:
    torch.manual_seed(seed)
    return case.build(**kwargs).eval()


def inputs(case: LayerCase, batch: int = 3, *, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return case.inputs(batch)


def call(case: LayerCase, layer: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name; a layer that draws noise draws the same for the same batch size."""
    generator = {"generator": torch.Generator().manual_seed(3)} if case.random else {}
    return case.outputs(layer(**arguments, **generator))


def cast(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}


def total(outputs: dict[str, Tensor]) -> Tensor:
    """All floating outputs as one vector, so that one projection sees every part."""
    return torch.cat([value.flatten().double() for value in outputs.values() if value.is_floating_point()])
