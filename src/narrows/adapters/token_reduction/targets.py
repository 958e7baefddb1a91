"""Budgets that have to be worked out: so many multiply-accumulates, so much time."""

from abc import ABC, abstractmethod

from torch import Tensor

from narrows.adapters.token_reduction.budget import Attempt, Solution
from narrows.adapters.token_reduction.reduction import Reduction
from narrows.errors import InvalidArgument, InvalidType
from narrows.measure import compare_speed, evaluating, macs_per_sample
from narrows.measure.cost import scaled


class CostTarget(ABC):
    """Base class: a cost that the reduced model is to stay below, met with as many tokens as it allows.

    Cost falls with the number of tokens, so that bisection finds the greatest count that meets the goal; it holds from
    block `depth // 4` on, as a single number does as a budget.

    Args:
        goal: the most that it may cost.
        images: the calibration batch, as the model takes it. By default images are random: good enough for methods that
            keep as many tokens of every image; `ats` keeps fewer of easy images and needs real ones.
    """

    batch: int  # random images that are calibrated on

    def __init__(self, goal: int | float, images: Tensor | None = None) -> None:
        name = type(self).__name__
        if isinstance(goal, bool) or not isinstance(goal, int | float):
            raise InvalidType(name, expected="a number", got=repr(goal))
        if not 0 < goal < float("inf"):
            raise InvalidArgument(name, expected="a finite number above 0", got=goal)
        if images is not None and (images.ndim != 4 or len(images) == 0):
            raise InvalidArgument("images", expected="a batch [B, C, H, W]", got=f"shape {tuple(images.shape)}")
        self.goal, self.images = goal, images

    @abstractmethod
    def cost(self, reduction: Reduction, images: Tensor) -> float:
        """What the reduced model costs on these images."""

    @abstractmethod
    def text(self, cost: int | float) -> str:
        """A cost in words."""

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
        # `high` costs too much; `low` meets the goal, or is fewer than the method can get down to.
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
        """None where the method cannot get down to that few tokens."""
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
        """In mega, giga or tera."""
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
