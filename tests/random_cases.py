"""Random calls of operations and layers: how many there are, and tensors that lie in memory as users' tensors do.

`make test` draws 100 for each, always the same ones; `NARROWS_RANDOM_CASES=nightly` draws 1,000 others every time.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import assert_close

settings.register_profile(
    "test", max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("nightly", settings.get_profile("test"), max_examples=1000, derandomize=False)
random_cases = settings.get_profile(os.environ.get("NARROWS_RANDOM_CASES", "test"))

LAYOUTS = ("contiguous", "strided", "transposed", "offset", "expanded")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

seeds = st.integers(0, 2**20)
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from(DTYPES)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The tensor as another kind of view; expanded, its samples are all the first one, in the same memory."""
    if value.ndim < 2 or value.numel() == 0 or layout == "contiguous":
        return value
    if layout == "strided":
        return torch.stack([value, torch.full_like(value, 1)], -1)[..., 0]
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return torch.cat([value.new_ones(3), value.flatten()])[3:].view(value.shape)
    return value[:1].expand(value.shape)


def exact(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in float64, each in memory of its own."""
    return {
        name: value.to(torch.float64, copy=True).contiguous()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def assert_rounded(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int) -> None:
    """Equal but for so many roundings of a number as large as the largest, or as 1."""
    assert not found.is_floating_point() or torch.isfinite(found).all(), "not finite"
    assert_close(found.double(), expected.double(), roundings * torch.finfo(dtype).eps)
