"""A check that the adapter computes what the model computes: with every token kept, outputs must not change."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from narrows.adapters.token_reduction.block import ReducedBlock, in_order
from narrows.adapters.token_reduction.calls import drive, release
from narrows.adapters.token_reduction.hosts.base import HostBlock, first_of, with_first
from narrows.adapters.token_reduction.methods import Merge, Merging, Pruning, Signals
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.adapters.token_reduction.tokens import (
    Call,
    Padded,
    TokenState,
    copy_kept_mask,
    kept_mask_of,
    with_state,
)
from narrows.costs import evaluating
from narrows.errors import NarrowsError
from narrows.ops.token_sampling import TokenSample

TOLERANCE = 1e-5
# In units in the last place: the tolerance in half precision, and for the rounding of large tokens in float32.
ROUNDINGS = 8
_DRAWS = 8  # of roundings, where they move a model by steps


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


def check(reduction: Reduction, example: Any = None) -> float:
    """Run a reduction that is not attached yet with every token kept, and then as it is.

    Every block that is taken apart is compared alone, on the tokens of the untouched model, and then all of them one
    after another.

    Args:
        reduction: to be tested.
        example: what the whole model is called with; random images for the vision transformer alone if None.

    Returns:
        By how much the last tokens differ, relative to the greatest of them.

    Raises:
        NarrowsError: a block differs by more than roundings; the message names it.
    """
    host, method = reduction.host, reduction.method
    keep_all = JoinNone(method.proportional) if isinstance(method, Merging) else KeepAll()
    schedule = tuple(None if entry is None else 1.0 for entry in reduction.schedule)
    rehearsal = Reduction(reduction.model, host, keep_all, schedule, execution=reduction.plan.execution)
    run = _call_of(reduction, example)
    device = next(host.module.parameters()).device.type
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with evaluating(reduction.model), torch.no_grad(), exact:
        last = reduction.blocks[-1].host
        watched = {block.index: last.module for block in (reduction.blocks[-1],)}
        untouched = _calls({**{block.index: block.host.module for block in reduction.taken_apart}, **watched}, run)
        for block in reduction.taken_apart:
            _check_block(block, rehearsal, untouched[block.index])
        expected = last.tokens(untouched[host.depth - 1].output)

        def last_tokens() -> Tensor:
            return last.tokens(_calls(watched, run)[host.depth - 1].output)

        with rehearsal.attach():
            error = _difference(last_tokens(), expected)
        allowed = max(TOLERANCE, ROUNDINGS * _eps(expected)) * (host.depth - reduction.plan.first)
        if error > allowed:
            first = reduction.blocks[reduction.plan.first].host
            allowed = max(allowed, _moved_by_roundings(first, last_tokens, expected) / expected.abs().max().item())
        _require(error <= allowed, "the last block", error, allowed)
        with reduction.attach():
            run()
        reduction.forget()
    return error


def _call_of(reduction: Reduction, example: Any) -> Callable[[], object]:
    if example is None:
        return partial(reduction.host.module, **reduction.host.example(2))
    if isinstance(example, Mapping):
        return partial(reduction.model, **example)
    return partial(reduction.model, *(example if isinstance(example, tuple | list) else (example,)))


def pools_dropped(reduction: Reduction, example: Any = None) -> bool:
    """Whether something around the vision transformer pools all tokens, dropped ones too.

    What the model returns then depends on them, and not on their order. What reads the class token does not depend on
    them, what reads the grid as a grid depends on their order. A model that cannot be called with images alone is not
    called without an example.

    Args:
        reduction: attached.
        example: what the whole model is called with.
    """
    model, host = reduction.model, reduction.host
    if example is None and model is host.module:  # narrows knows what it does with its tokens
        return False
    images = {} if example is not None else host.example(2)
    named = images.keys() <= inspect.signature(model.forward).parameters.keys()
    if not named and len(images) > 1:
        return False
    run = partial(model, **images) if named else partial(model, *images.values())
    run = run if example is None else _call_of(reduction, example)
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            changes = (lambda rows, _: rows, _replaced, _turned)
            as_is, other, turned = (_leaves(reduction, run, change) for change in changes)
        except Exception:
            if example is not None:
                raise
            return False
        finally:
            reduction.forget()
    return any(_pooled(*tensors) for tensors in zip(as_is, other, turned, strict=True))


def _leaves(
    reduction: Reduction, run: Callable[[], object], change: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """What the model returns where dropped tokens are changed after the last block."""
    block = reduction.blocks[-1].host

    def changed(module: nn.Module, _: Any, result: Any) -> Any:
        rows = in_order(block, block.tokens(result))
        kept = kept_mask_of(rows)
        if kept is None:
            return result
        others = change(rows, ~kept)
        copy_kept_mask(module, (rows,), others)
        return block.with_tokens(result, in_order(block, others))

    hook = block.module.register_forward_hook(changed)
    try:
        leaves = tree_leaves(run())
    finally:
        hook.remove()
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _replaced(rows: Tensor, dropped: Tensor) -> Tensor:
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
    return torch.where(dropped[..., None], noise * rows.std(), rows)


def _turned(rows: Tensor, dropped: Tensor) -> Tensor:
    turned = _replaced(rows, dropped)
    for image, of_image in zip(turned, dropped, strict=True):
        image[of_image] = image[of_image].flip(0)
    return turned


def _pooled(as_is: Tensor, other: Tensor, turned: Tensor) -> bool:
    scale = other.abs().max().item() if other.numel() else 0.0
    depends, ordered = ((each - other).abs().max().item() if scale else 0.0 for each in (as_is, turned))
    roundings = ROUNDINGS * 2 * torch.finfo(other.dtype).eps * scale
    return depends > 4 * roundings and ordered <= roundings


def _calls(blocks: dict[int, nn.Module], run: Callable[[], object]) -> dict[int, _Call]:
    """What each block is called with and returns when the model runs."""
    calls: dict[int, _Call] = {}

    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[index] = _Call(args, kwargs, output)

    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, output, index=index: record(index, args, kwargs, output), with_kwargs=True
        )
        for index, block in blocks.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    missing = blocks.keys() - calls.keys()
    if missing:
        raise NarrowsError(
            f"self-test: the call of the model does not reach block {min(missing)}: give an example= that does."
        )
    return calls


def _check_block(block: ReducedBlock, rehearsal: Reduction, call: _Call) -> None:
    """Compare one block's update, with and without reduction; layer scale may make it small against the tokens."""
    host, index = block.host, block.index
    before = host.tokens(first_of(call.args, call.kwargs))
    after, (batch, width) = host.tokens(call.output), in_order(host, before).shape[:2]
    eps = ROUNDINGS * _eps(after)
    allowed = max(TOLERANCE, eps) * (after - before).abs().max().item() + eps * after.abs().max().item()
    entry = None if block.entry is None else 1.0
    alone = ReducedBlock(host, rehearsal.plan, entry, index=index, last=True, in_steps=True)
    with_state(before, TokenState(Call(), width, Padded(batch, width)))
    drive(host.module, {"forward": alone.run})
    try:
        result = host.module(*call.args, **call.kwargs)  # not `run`, so that what shards or offloads sees the call
    finally:
        release(host.module)
    error = (host.tokens(result) - after).abs().max().item()
    if error > allowed:
        own = partial(host.module, *call.args, **call.kwargs)
        allowed = max(allowed, _moved_by_roundings(host, lambda: host.tokens(own()), after))
    _require(error <= allowed, f"block {index} ({type(host.module).__name__})", error, allowed)


def _moved_by_roundings(block: HostBlock, run: Callable[[], Tensor], expected: Tensor) -> float:
    """How far two results of the untouched model can lie apart where tokens that come to a block are rounded otherwise.

    Quantised activations turn the last digit of a number into a step of their own: a block holds nothing unknown that
    differs by such steps.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = block.tokens(first_of(args, kwargs))
        noise = (2 * torch.rand(tokens.shape, generator=generator) - 1).to(tokens)
        tokens = tokens * (1 + ROUNDINGS * _eps(tokens) * noise)
        return with_first(args, kwargs, block.with_tokens(first_of(args, kwargs), tokens))

    hook = block.module.register_forward_pre_hook(rounded, with_kwargs=True)
    try:
        return 2 * max((run() - expected).abs().max().item() for _ in range(_DRAWS))
    finally:
        hook.remove()


def _eps(tokens: Tensor) -> float:
    """The relative rounding of products that give these tokens."""
    rounding = torch.finfo(tokens.dtype).eps
    if tokens.device.type == "cuda" and tokens.dtype == torch.float32:
        # TensorFloat32 has a mantissa of ten bits. It is not switched off here: that would reach other threads.
        return rounding if torch.get_float32_matmul_precision() == "highest" else 2.0**-10
    return rounding


def _difference(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def _require(holds: bool, where: str, error: float, allowed: float) -> None:
    if not holds:
        raise NarrowsError(
            f"self-test: with every token kept, {where} differs from the untouched model by {error:.1e}, more than "
            f"{allowed:.1e}: the block holds something that narrows does not know. The model is left as it was."
        )
