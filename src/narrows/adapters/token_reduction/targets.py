"""Budgets given as a cost that the reduced model must not exceed: multiply-accumulates or time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from narrows.adapters.token_reduction.budget import FixedBudget
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.errors import InvalidArgument, InvalidType
from narrows.measure import compare_speed, evaluating, macs_per_sample
from narrows.measure.cost import scaled
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
    """Base class of targets: the greatest number of tokens whose cost does not exceed a goal, found by bisection.

    Cost grows with the number of tokens. The number holds from block `depth // 4` on, like a budget of one number.

    Args:
        goal: the most that it may cost.
        images: the calibration batch, as the model takes it. By default images are random: good enough for methods that
            keep as many tokens of every image; `ats` keeps fewer of easy images and needs real ones.
    """

    batch: int  # number of random images to calibrate on

    def __init__(self, goal: int | float, images: Tensor | None = None) -> None:
        name = type(self).__name__
        if isinstance(goal, bool) or not isinstance(goal, int | float):
            raise InvalidType(name, expected="a number", got=repr(goal))
        if not 0 < goal < float("inf"):
            raise InvalidArgument(name, expected="a finite number above 0", got=goal)
        if images is not None:
            check_tensor("images", images, expected="a batch [B, C, H, W] or None")
        if images is not None and (images.ndim != 4 or len(images) == 0):
            raise InvalidArgument("images", expected="a batch [B, C, H, W]", got=f"shape {tuple(images.shape)}")
        self.goal, self.images = goal, images

    @abstractmethod
    def cost(self, reduction: Reduction, images: Tensor) -> float:
        """What the reduced model costs on these images."""

    @abstractmethod
    def text(self, cost: int | float) -> str:
        """A cost with its unit."""

    def solve(self, attempt: Attempt) -> Solution:
        """The greatest number of tokens that meets the goal.

        Raises:
            InvalidArgument: not even the least number does; the message names what that costs.
        """
        most, images = self._begin(attempt)
        dearest = self._cost(attempt, most, images)
        assert dearest is not None, "keeping every token is possible with any method"
        if dearest <= self.goal:
            return self._solution(most, dearest, most)
        # `high` costs too much; `low` meets the goal, or is below what the method can reach.
        low, high, met = 0, most, None
        while high - low > 1:
            count = (low + high) // 2
            cost = self._cost(attempt, count, images)
            if cost is None or cost <= self.goal:
                low, met = count, cost
            else:
                high, dearest = count, cost
        if met is None:
            raise InvalidArgument(
                "budget",
                expected=f"a target of at least {self.text(dearest)}, which {high} of {most} tokens cost",
                got=self.text(self.goal),
            )
        return self._solution(low, met, most)

    def _solution(self, count: int, cost: float, most: int) -> Solution:
        asked, reached = self.text(self.goal), self.text(cost)
        return Solution(count, f"at most {asked} asked, {reached} reached with {count} of {most} tokens")

    def _begin(self, attempt: Attempt) -> tuple[int, Tensor]:
        """How many tokens there are, and the calibration batch."""
        with attempt(1.0) as reduction:
            host = reduction.host
            images = next(iter(host.example(self.batch).values())) if self.images is None else self.images
            return host.num_tokens, images.to(next(host.module.parameters()).device)

    def _cost(self, attempt: Attempt, count: int, images: Tensor) -> float | None:
        """The cost of `count` tokens; None where the method cannot reach so few."""
        try:
            reduction = attempt(count)
        except InvalidArgument:
            return None
        with reduction, evaluating(reduction.model):
            return self.cost(reduction, images)


class TargetMACs(CostTarget):
    """At most so many multiply-accumulates for an image, with the tokens really kept, mean over the calibration batch.

    >>> narrows.reduce_tokens(model, method="topk", budget=TargetMACs(2.9e9))  # doctest: +SKIP
    """

    batch = 4

    def cost(self, reduction: Reduction, images: Tensor) -> float:
        """Multiply-accumulates of an image."""
        return macs_per_sample(reduction.model, images, batch=len(images))

    def text(self, cost: int | float) -> str:
        """MMACs, GMACs or TMACs."""
        return f"{scaled(cost)}MACs"


class TargetLatency(CostTarget):
    """At most so many seconds for a batch, as the calibration batch is: the median of several calls on this machine.

    >>> narrows.reduce_tokens(model, budget=TargetLatency(0.04, images))  # doctest: +SKIP
    """

    batch = 1

    def cost(self, reduction: Reduction, images: Tensor) -> float:
        """Seconds for the batch."""
        return compare_speed({"": lambda: reduction.model(images)}, device=images.device)[""].median

    def text(self, cost: int | float) -> str:
        """In milliseconds."""
        return f"{cost * 1e3:.3g} ms"
