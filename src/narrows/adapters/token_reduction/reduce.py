"""`reduce_tokens`: token reduction for a pretrained vision transformer."""

import warnings
from typing import Any

import torch
from torch import nn

from narrows.adapters.token_reduction import self_test
from narrows.adapters.token_reduction.budget import FixedBudget, as_plain, schedule_of
from narrows.adapters.token_reduction.calls import is_driven
from narrows.adapters.token_reduction.hosts import HostModel, recognise
from narrows.adapters.token_reduction.methods import METHODS, Merging, Pruning, ReductionMethod
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.adapters.token_reduction.targets import Budget, Target
from narrows.errors import InvalidArgument, InvalidType
from narrows.validation import check_choice, check_generator

EXECUTIONS = ("auto", "static", "ragged")


def reduce_tokens(
    model: nn.Module | HostModel,
    *,
    method: str | ReductionMethod = "ats",
    budget: Budget = 0.5,
    execution: str = "auto",
    generator: torch.Generator | None = None,
    example: Any = None,
) -> Reduction:
    """Let a vision transformer carry fewer tokens through its blocks; the handle that is returned undoes it.

    The model itself runs reduced from then on. Whatever it returns keeps its shape: features and intermediates are on
    the full grid, tokens that were dropped in the last state they had. Special tokens are never dropped. Before
    anything is changed, the model is run with every token kept, which must reproduce what it computes untouched.

    Args:
        model: a vision transformer of timm, a module that holds one, or a `HostModel` of your own.
        method: "ats", "topk", "evit", "tome", "random", a name that another package brings, or an instance of a
            `Pruning` or `Merging` class.
        budget: how many tokens after the prefix go on: a count or a share, from block `depth // 4` on; a sequence with
            an entry (or None) for each block; a mapping from block to entry; or a target such as `TargetMACs`.
        execution: "static" keeps shapes fixed and masks slots that hold no token; "ragged" packs rows without padding;
            "auto" packs where a method keeps another number for each image and nothing traces or masks.
        generator: source of randomness for methods that draw while training; torch's global one if None.
        example: what `model` is called with in the test, for models that are not called with images alone: a mapping of
            arguments, a tuple of them, or one tensor. By default random images for the vision transformer alone.

    Raises:
        InvalidArgument: an unknown method or execution, a budget that cannot be met, a model that is already reduced or
            in a state that cannot be handled.
        InvalidType: a model, or a block in it, of a class that is not supported; the message names it.
        NarrowsError: the self-test failed.

    On any error the model is left as it was.
    """
    check_choice("execution", execution, EXECUTIONS)
    check_generator(generator)
    chosen = _method(method)
    host = model if isinstance(model, HostModel) else recognise(model)
    outer = host.module if isinstance(model, HostModel) else model
    _check_state(outer, host)
    budget = as_plain(budget)
    error: float | None = None

    def attempt(entries: FixedBudget) -> Reduction:
        nonlocal error
        schedule = schedule_of(entries, chosen, depth=host.depth, num_tokens=host.num_tokens)
        reduction = Reduction(outer, host, chosen, schedule, execution=execution, generator=generator)
        reduction.check_replaceable()
        if error is None:  # what is tested does not depend on how many tokens go on
            error = self_test.check(reduction, example)
        reduction.error, reduction.example = error, example
        return reduction.attach()

    if isinstance(budget, Target):
        solution = budget.solve(attempt)
        reduction = attempt(solution.budget)
        reduction.target = solution.note
    else:
        reduction = attempt(budget)
    try:
        _warn_of_stale_tokens(reduction, example)
    except BaseException:  # a warning may be made an error
        reduction.remove()
        raise
    return reduction


def _warn_of_stale_tokens(reduction: Reduction, example: Any) -> None:
    model = reduction.model
    stale = ", ".join(reduction.host.stale_heads(model))
    if not stale and self_test.pools_dropped(reduction, example):
        stale = type(model).__name__
    if stale:
        warnings.warn(
            f"{stale} may average over tokens, or attend to them wherever they stand, and narrows cannot make it see "
            "kept ones only: it gets the whole grid, with dropped tokens in the last state they had. Read the class "
            "token, or average over the positions of reduction.routing[-1].",
            stacklevel=3,
        )


def _method(method: str | ReductionMethod) -> ReductionMethod:
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        name, method = method, METHODS[method]()
        if not isinstance(method, Pruning | Merging):
            expected = "an entry point that makes an instance of Pruning or Merging"
            raise InvalidType(f"method {name!r}", expected=expected, got=repr(method))
    if not isinstance(method, Pruning | Merging):
        raise InvalidType(
            "method", expected=f"one of {tuple(METHODS)} or an instance of Pruning or Merging", got=repr(method)
        )
    return method


def _check_state(model: nn.Module, host: HostModel) -> None:
    if model.__class__.__name__ == "OptimizedModule":
        raise InvalidArgument(
            "model", expected="a model before torch.compile", got="a compiled one", hint="Reduce it first."
        )
    if any(parameter.is_meta for parameter in host.module.parameters()):
        raise InvalidArgument("model", expected="weights", got="parameters on the meta device")
    if is_driven(host.module) or any(map(is_driven, host.blocks)):
        raise InvalidArgument(
            "model", expected="a model that is not reduced", got="a reduced one", hint="remove() that reduction first."
        )
    if len(set(host.blocks)) < host.depth:
        raise InvalidArgument(
            "model", expected="blocks of their own", got="one module in the place of several blocks (tied weights)"
        )
