"""Budgets given as a cost that the reduced model must not exceed: multiply-accumulates or time."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from narrows.adapters.token_reduction.budget import FixedBudget
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.costs import compare_speed, count_macs, evaluating
from narrows.costs.cost import scaled
from narrows.errors import InvalidArgument, InvalidType
from narrows.validation import check_tensor


class Solution(NamedTuple):
    """The budget that meets a target.

    Args:
        budget: tokens to keep.
        note: what was asked and what was reached, for the handle's `str()`.
    """

    budget: FixedBudget
    note: str


Attempt = Callable[[FixedBudget], Reduction]

_TARGET = re.compile(r"(\d+(?:\.\d+)?)(ms|[MGT])(?:MACs?)?")
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}


@runtime_checkable
class Target(Protocol):
    """A budget that is found by trying: so much time, so many multiply-accumulates."""

    def solve(self, attempt: Attempt) -> Solution:
        """The budget that meets the target.

        Args:
            attempt: reduces the model by a budget and returns the handle; each is removed before the next.
        """
        ...


Budget = FixedBudget | Target


class CostTarget(ABC):
    """Base class of targets: the greatest number of tokens whose cost does not exceed a goal.

    Cost grows with the number of tokens. The number holds from block `depth // 4` on, like a budget of one number. It
    is a count where the calibration batch is of the model's own image size, and a share of the tokens where it is not.

    What costs is the whole model where it takes images alone or an `example` was given, else its vision transformer.

    Args:
        goal: the most that it may cost.
        images: the calibration batch: images, or a mapping of the arguments that the model takes. By default the
            `example` of `reduce_tokens`, or random images: good enough for methods that keep as many tokens of every
            image; `ats` keeps fewer of easy images and needs real ones.
    """

    batch: int  # number of random images to calibrate on

    def __init__(self, goal: int | float, images: Tensor | Mapping[str, Any] | None = None) -> None:
        name = type(self).__name__
        if isinstance(goal, bool) or not isinstance(goal, int | float):
            raise InvalidType(name, expected="a number", got=repr(goal))
        if not 0 < goal < float("inf"):
            raise InvalidArgument(name, expected="a finite number above 0", got=goal)
        if images is not None and not isinstance(images, Mapping):
            check_tensor("images", images, expected="a batch [B, C, H, W], a mapping of arguments or None")
        if isinstance(images, Tensor) and (images.ndim != 4 or len(images) == 0):
            raise InvalidArgument("images", expected="a batch [B, C, H, W]", got=f"shape {tuple(images.shape)}")
        self.goal, self.images = goal, images

    @abstractmethod
    def cost(self, reduction: Reduction, images: Any) -> float:
        """What the reduced model costs on these images, or arguments by name."""

    def ceiling(self, reduction: Reduction, images: Any) -> float:
        """What no number of tokens exceeds; `reduction` keeps all of them."""
        with evaluating(reduction.model), torch.no_grad():
            return self.cost(reduction, images)

    @abstractmethod
    def text(self, cost: int | float) -> str:
        """A cost with its unit."""

    def solve(self, attempt: Attempt) -> Solution:
        """The greatest number of tokens that meets the goal.

        Raises:
            InvalidArgument: not even the least number does; the message names what that costs.
        """
        images, most, own_size, before, dearest = self._begin(attempt)

        def budget(count: int) -> FixedBudget:
            return count if own_size else count / most

        if dearest <= self.goal:
            reached = self._cost(attempt, budget(most), images)
            assert reached is not None, "keeping every token is possible with any method"
            return Solution(budget(most), self._note(most, reached, most))
        # `high` costs too much; `low` meets the goal, or is below what the method can reach.
        low, high, met = 0, most + 1, None
        known = [(0, before * dearest), (most, dearest)]  # the first is a guess, good for two steps
        steps = 0
        while high - low > 1:
            # Halved now and then, for costs that are no smooth curve.
            guess = _interpolated(known, self.goal) if steps % 6 < 5 else None
            count = (low + high) // 2 if guess is None else min(max(int(guess), low + 1), high - 1)
            cost, steps = self._cost(attempt, budget(count), images), steps + 1
            if cost is None or cost <= self.goal:
                low, met = count, cost
            else:
                high, dearest = count, cost
            known = [] if cost is None else [*known[-2:], (count, cost)]
        if met is None:
            raise InvalidArgument(
                "budget",
                expected=f"a target of at least {self.text(dearest)}, which {min(high, most)} of {most} tokens cost",
                got=self.text(self.goal),
            )
        return Solution(budget(low), self._note(low, met, most))

    def _note(self, count: int, cost: float, most: int) -> str:
        asked, reached = self.text(self.goal), self.text(cost)
        return f"at most {asked} asked, {reached} reached with {count} of {most} tokens"

    def _begin(self, attempt: Attempt) -> tuple[Any, int, bool, float, float]:
        """The calibration batch, its tokens, whether they are those of the own size, the share of whole blocks, and
        what no number of tokens exceeds.
        """
        with attempt(1.0) as reduction:
            host = reduction.host
            images = reduction.example if self.images is None else self.images
            if images is None:
                example = host.example(self.batch)
                images = example if len(example) > 1 else next(iter(example.values()))
            device = next(host.module.parameters()).device
            images = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, images)
            seen = [value for value in tree_leaves(images) if isinstance(value, Tensor) and value.ndim == 4]
            grid = host.grid_of(seen[0]) if seen else None
            most = host.num_tokens if grid is None else grid[0] * grid[1]
            share = reduction.plan.first / host.depth
            return images, most, most == host.num_tokens, share, self.ceiling(reduction, images)

    def _cost(self, attempt: Attempt, budget: FixedBudget, images: Any) -> float | None:
        """The cost of a budget; None where the method cannot reach it."""
        try:
            reduction = attempt(budget)
        except InvalidArgument:
            return None
        with reduction, evaluating(reduction.model), torch.no_grad():
            return self.cost(reduction, images)


def _interpolated(known: list[tuple[int, float]], goal: int | float) -> float | None:
    """Where the curve through up to three points `(count, cost)` meets the goal; None where there is none."""
    if len(known) < 2 or len({cost for _, cost in known}) < len(known):
        return None
    others = [[(goal - other) / (cost - other) for _, other in known if other != cost] for _, cost in known]
    return sum(count * prod(factors) for (count, _), factors in zip(known, others, strict=True))


def _call(reduction: Reduction, images: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """What is called, and with what: the whole model where it takes images alone."""
    model, host = reduction.model, reduction.host
    named = dict(images) if isinstance(images, Mapping) else {}
    unnamed = () if isinstance(images, Mapping) else tuple(images) if isinstance(images, tuple | list) else (images,)
    takes = list(inspect.signature(model.forward).parameters)
    whole = reduction.example is not None or set(named) - set(inspect.signature(host.module.forward).parameters)
    if whole or (takes and takes[0] != "input_ids"):
        return model, unnamed, named
    return host.module, unnamed, named


class TargetMACs(CostTarget):
    """At most so many multiply-accumulates for an image, with the tokens really kept, mean over the calibration batch.

    >>> narrows.reduce_tokens(model, method="topk", budget=TargetMACs(2.9e9))  # doctest: +SKIP
    """

    batch = 4

    def cost(self, reduction: Reduction, images: Any) -> float:
        """Multiply-accumulates of an image."""
        model, args, kwargs = _call(reduction, images)
        calls = list(reduction.without_padding(*args, model=model, **kwargs))
        if not reduction.method.adaptive:  # every image costs the same
            return float(count_macs(calls[0]))
        if reduction.plan.execution != "static":  # all images at once, if their rows are packed
            macs = count_macs(partial(model, *args, **kwargs))
            if not reduction.padded:
                return macs / len(calls)
        return sum(count_macs(call) for call in calls) / len(calls)

    def ceiling(self, reduction: Reduction, images: Any) -> float:
        """Those of one image and the model untouched."""
        model, args, kwargs = _call(reduction, images)
        one = next(iter(reduction.without_padding(*args, model=model, **kwargs)))
        reduction.remove()
        with evaluating(reduction.model), torch.no_grad():
            return float(count_macs(one))

    def text(self, cost: int | float) -> str:
        """MMACs, GMACs or TMACs."""
        return f"{scaled(cost)}MACs"


class TargetLatency(CostTarget):
    """At most so many seconds for a batch, as the calibration batch is: the median of several calls on this machine.

    >>> narrows.reduce_tokens(model, budget=TargetLatency(0.04, images))  # doctest: +SKIP
    """

    batch = 1

    def cost(self, reduction: Reduction, images: Any) -> float:
        """Seconds for the batch."""
        model, args, kwargs = _call(reduction, images)
        return compare_speed({"": partial(model, *args, **kwargs)}, device=next(model.parameters()).device)[""].median

    def text(self, cost: int | float) -> str:
        """In milliseconds."""
        return f"{cost * 1e3:.3g} ms"


def parse_budget(text: str, images: Tensor | None = None) -> Budget:
    """A share ("0.5", "50%"), a count ("98"), MACs ("2.9G"), the time of a batch ("40ms"), or block by block ("3:0.7").

    >>> parse_budget("0.5"), parse_budget("50%"), parse_budget("98"), parse_budget("3:0.7/6:96")
    (0.5, 0.5, 98, {3: 0.7, 6: 96})

    Args:
        text: what was written.
        images: the calibration batch of a target.

    Raises:
        InvalidArgument: it is none of these.
    """
    text = text.strip()
    try:
        if target := _TARGET.fullmatch(text):
            number, unit = float(target[1]), target[2]
            if unit == "ms":
                return TargetLatency(number / 1e3, images)
            return TargetMACs(number * _UNITS[unit], images)
        if ":" in text:
            return {int(block): _number(entry) for block, entry in (part.split(":") for part in text.split("/"))}
        return _number(text)
    except ValueError as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            "budget",
            expected="a share (0.5 or 50%), a count (98), a target (2.9G MACs, 40ms), or block:share/block:share",
            got=repr(text),
        ) from None


def _number(text: str) -> int | float:
    text = text.strip()
    if re.fullmatch(r"[+-]?\d{1,9}", text):
        number: int | float = int(text)
        possible = number >= 1
    else:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        possible = 0 < number <= 1
    if not possible:
        raise ValueError(text)
    return number
