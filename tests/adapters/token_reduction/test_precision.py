"""Weights and images in half precision, and in the memory format that convolutions of GPUs like."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from narrows.adapters.token_reduction import METHODS, MergedTokens, ReductionMethod, Signals, reduce_tokens
from tests.adapters.token_reduction.hosts import HOSTS, inputs
from tests.adapters.token_reduction.test_every_host import assert_all_close, every_host, run
from tests.support import RoundedTo, assert_within_budget_on_average


class Seen:
    """What methods look at in one model, noted, and shown to them again in another: they choose the same tokens there.

    Choices are steps: where two scores are nearly the same, a rounding keeps another token.
    """

    def __init__(self) -> None:
        self.noted: list[Signals] = []
        self._look: Callable[[Signals], Signals] = lambda own: own

    def __call__(self, own: Signals) -> Signals:
        """The signals that a method is to look at."""
        return self._look(own)

    def noting(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What a call gives."""

        def note(own: Signals) -> Signals:
            self.noted.append(own)
            return own

        return self._run(call, note)

    def showing(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What a call gives where methods choose by what was noted."""
        noted = iter(self.noted)

        def show(own: Signals) -> Signals:
            seen, like = next(noted), own.rows[0]
            rows = like, seen.rows[1].to(like), seen.rows[2].to(like)
            return replace(own, rows=rows, attention_received=lambda: seen.attention.to(like))

        result = self._run(call, show)
        assert next(noted, None) is None
        return result

    def _run(self, call: Callable[[], list[Tensor]], look: Callable[[Signals], Signals]) -> list[Tensor]:
        self._look = look
        result = call()
        self._look = lambda own: own  # of the self-test
        return result


def looking_at(method: str, seen: Seen) -> ReductionMethod:
    """A method of narrows that chooses by what `seen` makes of its signals, no step of it rounded."""

    class Looking(METHODS[method]):  # pyright: ignore
        def choose_with_prefix(self, signals: Signals, count: int) -> tuple[Tensor, Tensor | None]:
            with _disable_current_modes():
                return super().choose_with_prefix(seen(signals), count)

        def merged(self, signals: Signals, tokens: Tensor, count: int) -> MergedTokens:
            with _disable_current_modes():
                return super().merged(seen(signals), tokens, count)

    return Looking()


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_host
@torch.no_grad()
def test_half_precision_is_as_near_as_every_operation_rounded(name: str, dtype: torch.dtype) -> None:
    model = HOSTS[name]()
    arguments = cast(inputs(model, 2), dtype)
    exact_arguments = cast(arguments, torch.float64)
    half = model.to(dtype)
    exact = copy.deepcopy(half).double()
    untouched, draws = run(half, arguments), []
    for method in ("topk", "tome", "ats"):
        seen, budget = Seen(), {1: 0.6, 2: 0.4}
        settings: dict[str, Any] = {"method": looking_at(method, seen), "budget": budget, "execution": "static"}
        with reduce_tokens(half, **settings):
            fast = seen.noting(lambda: run(half, arguments))
        assert len(seen.noted) == 2
        assert all(torch.isfinite(signals.attention).all() for signals in seen.noted)
        with reduce_tokens(exact, **settings):
            oracle = seen.showing(lambda: run(exact, exact_arguments))
            with RoundedTo(dtype):
                plain = seen.showing(lambda: run(exact, exact_arguments))
        assert [tensor.dtype for tensor in fast] == [tensor.dtype for tensor in untouched]
        assert untouched[0].dtype == dtype
        results = fast, plain, [tensor.double() for tensor in oracle]
        draws += [tuple([tensor[image] for tensor in result] for result in results) for image in range(2)]
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm dinov3",
        "timm naflex",
        "transformers dinov2",
        "transformers siglip",
        "openai clip",
        "open_clip",
        "torchvision",
        "hub dinov2",
        "narrows vit",
    ],
)
def test_channels_may_come_last(name: str, method: str) -> None:
    model, other = HOSTS[name](), HOSTS[name]().to(memory_format=torch.channels_last)
    arguments = inputs(model, 2)
    last = {name: value.to(memory_format=torch.channels_last) for name, value in arguments.items()}
    assert not any(value.is_contiguous() for value in last.values())
    with reduce_tokens(model, method=method, budget=0.5), reduce_tokens(other, method=method, budget=0.5):
        expected = run(model, arguments)
        assert_all_close(run(model, last), expected)
        assert_all_close(run(other, last), expected)
        assert_all_close(run(other, arguments), expected)
