"""A check that the adapter computes what the model computes: with every token kept, outputs must not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from narrows.adapters.token_reduction.block import ReducedBlock
from narrows.adapters.token_reduction.hosts.base import HostBlock
from narrows.adapters.token_reduction.methods import Merge, Merging, Pruning, Signals
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.errors import NarrowsError
from narrows.measure import evaluating
from narrows.ops.token_sampling import TokenSample

TOLERANCE = 1e-5
# In units in the last place: the tolerance in half precision, and for the rounding of large tokens in float32.
ROUNDINGS = 8


class KeepAll(Pruning):
    """A pruning method that keeps every token."""

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """Every token."""
        scores = signals.significance
        ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool))


class JoinNone(Merging):
    """A merging method that merges nothing.

    Args:
        proportional: as of the method that is used later.
    """

    adaptive = True  # so that it runs although every token fits the budget

    def __init__(self, proportional: bool) -> None:
        self.proportional = proportional

    def merge(self, signals: Signals, count: int) -> Merge:
        """Every token into itself."""
        attention = signals.attention[:, 0]
        ids = torch.arange(attention.shape[1], device=attention.device).expand(attention.shape)
        return Merge(ids, torch.ones_like(attention), ids)


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def check(reduction: Reduction) -> float:
    """Run a reduction that is not attached yet with every token kept, and then as it is, on random images.

    Every block is compared alone, on the tokens of the untouched model, and then all of them one after another.

    Returns:
        By how much the last tokens differ, relative to the greatest of them.

    Raises:
        NarrowsError: a block differs by more than roundings; the message names it.
    """
    host, method = reduction.host, reduction.method
    keep_all = JoinNone(method.proportional) if isinstance(method, Merging) else KeepAll()
    schedule = tuple(1.0 if index >= reduction.blocks[0].index else None for index in range(host.depth))
    rehearsal = Reduction(reduction.model, host, keep_all, schedule, execution=reduction.plan.execution)
    inputs = host.example(2)
    with evaluating(host.module), torch.no_grad(), _exact_products():
        untouched = _calls(reduction, inputs)
        for index, call in untouched.items():
            _check_block(host.block(index), rehearsal, index, call)
        last = host.block(host.depth - 1)
        expected = last.tokens(untouched[host.depth - 1].output)
        with rehearsal.attached_temporarily():
            error = _difference(last.tokens(_calls(rehearsal, inputs)[host.depth - 1].output), expected)
        allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(expected.dtype).eps) * len(untouched)
        _require(error <= allowed, f"the last of {len(untouched)} blocks", error, allowed)
        with reduction.attached_temporarily():
            host.module(**inputs)
        reduction.forget()
    return error


def _calls(reduction: Reduction, inputs: dict[str, Tensor]) -> dict[int, _Call]:
    """What each block is called with and returns when the model runs."""
    calls: dict[int, _Call] = {}

    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[index] = _Call(args, kwargs, output)

    hooks = [
        block.host.module.register_forward_hook(
            lambda _, args, kwargs, output, index=block.index: record(index, args, kwargs, output), with_kwargs=True
        )
        for block in reduction.blocks
    ]
    try:
        reduction.host.module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _check_block(host: HostBlock, rehearsal: Reduction, index: int, call: _Call) -> None:
    """Compare one block's update, with and without reduction; layer scale may make it small against the tokens."""
    before, after = host.arguments(*call.args, **call.kwargs).grid, host.tokens(call.output)
    rounding = ROUNDINGS * torch.finfo(after.dtype).eps
    allowed = max(TOLERANCE, rounding) * (after - before).abs().max().item() + rounding * after.abs().max().item()
    for entry in (1.0, None):
        alone = ReducedBlock(host, rehearsal.plan, entry, index=index, first=True, last=True)
        error = (host.tokens(alone.forward(*call.args, **call.kwargs)) - after).abs().max().item()
        _require(error <= allowed, f"block {index} ({type(host.module).__name__})", error, allowed)


def _difference(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def _require(holds: bool, where: str, error: float, allowed: float) -> None:
    if not holds:
        raise NarrowsError(
            f"self-test: with every token kept, {where} differs from the untouched model by {error:.1e}, more than "
            f"{allowed:.1e}: the block holds something that narrows does not know. The model is left as it was."
        )


@contextmanager
def _exact_products() -> Iterator[None]:
    """No TensorFloat32, which may round the product with a slice of a weight otherwise than with the whole."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
