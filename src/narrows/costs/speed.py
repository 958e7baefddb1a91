"""Speed: functions timed against each other in one run, with the spread of the samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import median, quantiles
from time import perf_counter

import torch

from narrows.errors import InvalidArgument

MINIMUM_SECONDS = 0.02


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def p20(self) -> float:
        """The 20th percentile."""
        return self._fifths()[0]

    @property
    def p80(self) -> float:
        """The 80th percentile."""
        return self._fifths()[-1]

    def _fifths(self) -> list[float]:
        return quantiles(self.samples, n=5, method="inclusive") if len(self.samples) > 1 else [*self.samples]


class Timing(Spread):
    """Seconds per call."""

    def times_faster_than(self, rival: "Timing") -> Spread:
        """The rival's time over this one, from pairs of samples taken next to one another."""
        return Spread(tuple(theirs / ours for ours, theirs in zip(self.samples, rival.samples, strict=True)))


def compare_speed(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    limit: float | None = None,
) -> dict[str, Timing]:
    """Seconds per call of each contender, sampled in turns, so that a slowdown of the machine affects all.

    A sample is as many calls as take 20 milliseconds. Every other round is in reverse order, since the first contender
    finds other cache contents. On CUDA the time is between two events on the stream.

    Args:
        contenders: what to call, by name.
        repeats: samples of each contender.
        warmup: calls of each contender before the first sample.
        device: where the contenders do their work.
        limit: seconds after which no further round of samples begins.
    """
    if repeats < 1:
        raise InvalidArgument("repeats", expected="a positive integer", got=repeats)
    device = torch.device(device)
    sample = partial(_sample_cuda, device) if device.type == "cuda" else partial(_sample_host, device)
    for function in contenders.values():
        for _ in range(warmup):
            function()
    calls = {name: _calls_needed(function, sample) for name, function in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start = perf_counter()
    for repeat in range(repeats):
        if repeat and limit is not None and perf_counter() - start > limit:
            break
        for name in list(contenders)[:: 1 if repeat % 2 == 0 else -1]:
            samples[name].append(sample(contenders[name], calls[name]) / calls[name])
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _calls_needed(function: Callable[[], object], sample: Callable[[Callable[[], object], int], float]) -> int:
    calls = 1
    while (seconds := sample(function, calls)) < MINIMUM_SECONDS:
        wanted = ceil(calls * MINIMUM_SECONDS / max(seconds, 1e-9))
        calls = min(max(wanted, calls + 1), 10 * calls)
    return calls


def _sample_host(device: torch.device, function: Callable[[], object], calls: int) -> float:
    wait = torch.mps.synchronize if device.type == "mps" else None
    start = perf_counter()
    for _ in range(calls):
        function()
    if wait is not None:
        wait()
    return perf_counter() - start


def _sample_cuda(device: torch.device, function: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    start.record(stream)
    for _ in range(calls):
        function()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000
