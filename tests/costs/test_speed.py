"""Timing on a clock that the contenders themselves turn."""

from collections.abc import Callable

import pytest
import torch

from narrows.costs import Spread, Timing, compare_speed, speed
from narrows.errors import InvalidArgument


class Clock:
    """Time that passes only while a contender works, and who worked when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.readings: list[float] = []

    def read(self) -> float:
        self.readings.append(self.now)
        return self.now

    def contender(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        count = 0

        def call() -> None:
            nonlocal count
            self.now += seconds(count)
            count += 1
            self.calls.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "perf_counter", clock.read)
    return clock


def test_seconds_per_call(clock: Clock) -> None:
    timings = compare_speed(
        {"slow": clock.contender("slow", lambda _: 0.5), "fast": clock.contender("fast", lambda _: 0.001)}, repeats=5
    )
    assert timings["slow"].median == pytest.approx(0.5)
    assert timings["fast"].median == pytest.approx(0.001)
    assert [len(timing.samples) for timing in timings.values()] == [5, 5]
    assert timings["fast"].times_faster_than(timings["slow"]).median == pytest.approx(500)


@pytest.mark.parametrize("seconds", [1e-7, 1e-4, 0.019, 0.3])
def test_a_sample_lasts_twenty_milliseconds_and_not_much_longer(clock: Clock, seconds: float) -> None:
    compare_speed({"it": clock.contender("it", lambda _: seconds)}, repeats=1, warmup=0)
    start, end = clock.readings[-2:]
    assert 0.02 * (1 - 1e-6) <= end - start <= max(0.04, seconds * (1 + 1e-6))


def test_contenders_take_turns_and_the_first_place_too(clock: Clock) -> None:
    contenders = {name: clock.contender(name, lambda _: 1.0) for name in "abc"}
    compare_speed(contenders, repeats=4, warmup=2)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "abc" + "cba" + "abc" + "cba"


def test_warm_up_is_not_timed(clock: Clock) -> None:
    contender = clock.contender("it", lambda count: 100.0 if count < 2 else 1.0)
    assert compare_speed({"it": contender}, repeats=3, warmup=2)["it"].samples == (1.0, 1.0, 1.0)


def test_a_slowdown_of_the_machine_does_not_change_the_ratio(clock: Clock) -> None:
    def slowed(seconds: float) -> Callable[[int], float]:
        return lambda count: seconds * (1 + count)

    timings = compare_speed(
        {"a": clock.contender("a", slowed(1.0)), "b": clock.contender("b", slowed(3.0))}, repeats=7, warmup=0
    )
    assert timings["a"].samples[-1] > 3 * timings["a"].samples[0]
    assert timings["a"].times_faster_than(timings["b"]).samples == pytest.approx((3.0,) * 7)


def test_quantiles() -> None:
    spread = Spread(tuple(float(value) for value in (5, 1, 4, 0, 3, 2)))
    assert (spread.p20, spread.median, spread.p80) == (1.0, 2.5, 4.0)
    assert (Spread((7.0,)).p20, Spread((7.0,)).median, Spread((7.0,)).p80) == (7.0, 7.0, 7.0)


def test_ratios_need_as_many_samples() -> None:
    with pytest.raises(ValueError, match="zip"):
        Timing((1.0, 2.0)).times_faster_than(Timing((1.0,)))


def test_no_repeats() -> None:
    with pytest.raises(InvalidArgument, match=r"repeats: expected a positive integer, got 0\."):
        compare_speed({}, repeats=0)


def test_the_real_clock_orders_real_work() -> None:
    small, large = torch.randn(10, 10), torch.randn(200, 200)
    timings = compare_speed({"small": lambda: small @ small, "large": lambda: large @ large}, repeats=3)
    assert timings["small"].times_faster_than(timings["large"]).median > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_wait_for_the_device() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    timing = compare_speed({"product": lambda: x @ x}, repeats=3, device="cuda")["product"]
    # 1.1 TFLOP in float32: no device does it in the microseconds that queueing it takes.
    assert timing.median > 1e-3
