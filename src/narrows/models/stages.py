"""The stages of a pyramid: arguments that give one value for all of them, or one for each."""

from collections.abc import Sequence
from itertools import accumulate, cycle, islice, pairwise
from math import ceil
from operator import mul
from typing import NamedTuple, TypeVar

from narrows.errors import InvalidArgument
from narrows.validation import check_positive

Number = TypeVar("Number", int, float)


class StageShape(NamedTuple):
    """The sizes of one stage.

    Args:
        dim: token width.
        heads: attention heads.
        mlp_dim: hidden width of the feed-forwards.
        stride: how many tokens of the stage before, each way, become one.
        reduction: how many pixels, each way, become one.
        window_sizes: the window size of each block.
    """

    dim: int
    heads: int
    mlp_dim: int
    stride: int
    reduction: int
    window_sizes: tuple[int, ...]

    def window_grids(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """For each block, how many windows, down and across, an image of that `(height, width)` has there."""
        height, width = image_size
        return tuple(
            (ceil(height / (self.reduction * size)), ceil(width / (self.reduction * size)))
            for size in self.window_sizes
        )


def stage_shapes(
    *,
    dims: Sequence[int],
    depths: Sequence[int],
    heads: int | Sequence[int],
    window_size: int | Sequence[int | Sequence[int]],
    mlp_ratio: float | Sequence[float],
    patch_stride: int,
) -> tuple[StageShape, ...]:
    """The stages that the arguments of `SepViT` and `UpstreamSepViT` describe.

    Raises:
        InvalidArgument: a list of the wrong length, values that are not positive, window sizes of a stage of which one
            does not divide the next.
    """
    if not dims:
        raise InvalidArgument("dims", expected="at least one stage", got=dims)
    check_positive(patch_stride=patch_stride)
    count = len(dims)
    dims = integer_for_each_stage("dims", dims, count)
    depths = integer_for_each_stage("depths", depths, count)
    heads = integer_for_each_stage("heads", heads, count)
    ratios = _for_each_stage("mlp_ratio", mlp_ratio, count)
    windows = _windows_for_each_stage(window_size, count)
    strides = (patch_stride, *(2 for _ in dims[1:]))
    reductions = tuple(accumulate(strides, mul))
    return tuple(
        StageShape(
            dim=dims[index],
            heads=heads[index],
            mlp_dim=round(dims[index] * ratios[index]),
            stride=strides[index],
            reduction=reductions[index],
            window_sizes=tuple(islice(cycle(windows[index]), depths[index])),
        )
        for index in range(count)
    )


def integer_for_each_stage(name: str, value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """`value` as a tuple with one positive integer for each stage."""
    values = _for_each_stage(name, value, stages)
    for each in values:
        check_positive(**{name: each})
    return values


def _for_each_stage(name: str, value: Number | Sequence[Number], stages: int) -> tuple[Number, ...]:
    """`value` as a tuple with one positive value for each stage."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    _check_length(name, values, value, stages)
    for each in values:
        if not each > 0:
            raise InvalidArgument(name, expected="positive values", got=value)
    return values


def _windows_for_each_stage(value: int | Sequence[int | Sequence[int]], stages: int) -> tuple[tuple[int, ...], ...]:
    """The window sizes that the blocks of each stage take in turn, as in `(7, (7, 14), (7, 14), 7)`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    _check_length("window_size", values, value, stages)
    in_turn = tuple(tuple(each) if isinstance(each, Sequence) else (each,) for each in values)
    for sizes in in_turn:
        if not sizes:
            raise InvalidArgument("window_size", expected="at least one window size for each stage", got=value)
        for size in sizes:
            check_positive(window_size=size)
        if any(larger % smaller for smaller, larger in pairwise(sorted(sizes))):
            raise InvalidArgument(
                "window_size", expected="window sizes of a stage of which each divides the next", got=value
            )
    return in_turn


def _check_length(name: str, values: Sequence[object], value: object, stages: int) -> None:
    if len(values) != stages:
        raise InvalidArgument(
            name, expected=f"one value, or {stages}: one for each of the stages that dims names", got=value
        )
