"""One place decides in which dtype things are computed."""

import pytest
import torch

from narrows.precision import accumulation_dtype, at_least_float32, autocast_off, compute_dtype

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        (SINGLE, None, SINGLE),
        (HALF, None, HALF),
        (DOUBLE, None, DOUBLE),
        (SINGLE, HALF, HALF),
        (torch.float16, HALF, HALF),
        (DOUBLE, HALF, DOUBLE),
    ],
)
def test_autocast_decides_for_all_but_float64(
    dtype: torch.dtype, autocast: torch.dtype | None, expected: torch.dtype
) -> None:
    tensor = torch.zeros(2, dtype=dtype)
    with torch.autocast("cpu", dtype=autocast or HALF, enabled=autocast is not None):
        assert compute_dtype(tensor) == expected


def test_sums_are_in_float32_or_the_widest_input() -> None:
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (HALF, SINGLE, DOUBLE))
    assert accumulation_dtype(half) == accumulation_dtype(half, single) == SINGLE
    assert accumulation_dtype(half, double) == DOUBLE
    assert at_least_float32(half).dtype == SINGLE
    assert at_least_float32(double) is double


def test_autocast_can_be_kept_out_of_a_block() -> None:
    square = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=HALF):
        assert (square @ square).dtype == HALF
        with autocast_off(square):
            assert (square @ square).dtype == SINGLE


def test_devices_without_autocast_have_their_own_dtype() -> None:
    shape = torch.zeros(2, device="meta")
    with autocast_off(shape):
        assert compute_dtype(shape) == SINGLE
