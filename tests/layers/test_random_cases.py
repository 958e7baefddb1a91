"""Layers on random shapes from 0, masks and layouts in memory, against themselves in float64."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrows.errors import NarrowsError
from tests.cases import LayerCase
from tests.layers.every_layer import CASES, build, call, every_layer
from tests.random_cases import exact, laid_out, layouts, random_cases, seeds
from tests.support import assert_close

pytestmark = pytest.mark.compiled

NAMES = {case.name: case for case in CASES}


@cache
def _layer(name: str, impl: str, dtype: torch.dtype) -> nn.Module:
    return build(NAMES[name], impl=impl).to(dtype).requires_grad_(False)


@every_layer
@random_cases
@given(
    batch=st.integers(0, 3), length=st.integers(0, 11), layout=layouts, seed=seeds, which=st.integers(0, 9),
    masked=st.booleans(), dtype=st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_a_layer_is_itself_in_float64(
    case: LayerCase, batch: int, length: int, layout: str, seed: int, which: int, masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    arguments = case.inputs(batch)
    for padded in set(case.padded.values()):
        value = arguments[padded]
        arguments[padded] = value.narrow(case.pad_axis, 0, min(length, value.shape[case.pad_axis]))
    arguments = {
        name: laid_out(value.to(dtype), layout) if value.is_floating_point() else value
        for name, value in arguments.items()
    }
    for mask, padded in case.padded.items() if masked else ():
        shape = arguments[padded].shape[: case.pad_axis + 1]
        arguments[mask] = torch.rand(shape) < torch.rand(batch, *(1 for _ in shape[1:])) * 1.5
    before = {name: value.clone() for name, value in arguments.items()}
    impl = (*case.impls, "auto")[which % (len(case.impls) + 1)]
    try:
        expected = call(case, _layer(case.name, "reference", torch.float64), exact(arguments))
    except NarrowsError as refused:  # no token at all where some are needed: every form says so, in the same words
        with pytest.raises(type(refused)):
            call(case, _layer(case.name, impl, dtype), arguments)
        return
    for name, value in call(case, _layer(case.name, impl, dtype), arguments).items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert_close(value, expected[name])
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"
