"""The runner on tiny contests whose outcome is known."""

import ctypes
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows.bench
from narrows.bench import runner
from narrows.bench.case import BenchCase, Contest
from narrows.bench.rows import Row, describe, rival_version, table
from narrows.bench.runner import MissingRival, find_cases, race, run
from narrows.costs import compare_speed
from narrows.errors import InvalidArgument, NarrowsError

CPU = torch.device("cpu")


class Scale(nn.Module):
    """Multiplies by a learned number, `work` times over; `error` makes it wrong, `backward` its gradient."""

    def __init__(self, *, work: int = 1, error: float = 0.0, wrong_gradient: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.work, self.error, self.wrong_gradient = work, error, wrong_gradient

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.work):
            y = (x * self.factor).exp()
        if self.wrong_gradient:
            y = y.detach() + (x - x.detach())
        return y + self.error


class Noisy(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(x.shape)


class Raises(Scale):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such luck\nand a long story")


class NotANumber(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


class OneMore(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2)


def case(ours: nn.Module, rival: nn.Module, *, size: int = 1000, **settings: object) -> BenchCase:
    def prepare(device: torch.device) -> Contest:
        x = torch.linspace(-1, 1, size, device=device)
        return Contest(ours, rival, lambda module: module(x), (x,), tolerance)

    tolerance = settings.pop("tolerance", 1e-4)
    return BenchCase("fake/1000", "fake Scale", prepare, **settings)  # type: ignore[arg-type]


def rows_of(case: BenchCase, **settings: object) -> dict[str, Row]:
    return {row.quantity: row for row in race(case, CPU, repeats=2, **settings)}  # type: ignore[arg-type]


def test_a_fair_race_gives_times_bytes_and_verdicts() -> None:
    targets = {"forward": 3.0, "forward+backward": 1000.0}
    rows = rows_of(case(Scale(), Scale(work=200), size=10_000, targets=targets))
    assert list(rows) == ["forward", "forward+backward", "saved"]
    forward, step, saved = rows.values()
    assert forward.verdict == "met"
    assert forward.narrows_p50 is not None
    assert forward.rival_p50 is not None
    assert forward.ratio_p50 is not None
    assert forward.ratio_p50 > 3
    assert forward.rival_p50 > 3 * forward.narrows_p50
    assert step.verdict == "missed"
    assert step.target == 1000.0
    assert saved.verdict == ""
    assert (forward.unit, saved.unit) == ("s", "bytes")


def test_bytes_saved_are_compared_and_weights_and_inputs_left_out() -> None:
    class Twice(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt().square()

    saved = rows_of(case(Scale(), Twice(), targets={"saved": 2.5}))["saved"]
    # exp keeps its result; the square root keeps its own, which the square shares.
    assert (saved.narrows_p50, saved.rival_p50, saved.ratio_p50) == (4000.0, 8000.0, 2.0)
    assert saved.verdict == "missed"


def test_nothing_saved_is_infinitely_better_than_something() -> None:
    class Linear(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Saving(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 + 0 * x.exp()

    assert rows_of(case(Linear(), Saving()))["saved"].ratio_p50 == float("inf")
    assert rows_of(case(Linear(), Linear()))["saved"].ratio_p50 == 1.0


@pytest.mark.parametrize(
    ("ours", "complaint"),
    [
        (Scale(error=1e-2), r"outputs differ by 1\.00e-02, allowed 1e-04"),
        (Scale(wrong_gradient=True), r"gradients of input 0 differ by .* of the largest, allowed 1e-04"),
        (NotANumber(), r"outputs differ by nan"),
        (OneMore(), r"output has shape \(2000,\), the rival's \(1000,\)"),
    ],
    ids=["output", "gradient", "nan", "shape"],
)
def test_a_contest_that_disagrees_is_not_timed(ours: nn.Module, complaint: str) -> None:
    rows = rows_of(case(ours, Scale(), targets={"forward": 0.0}))
    assert list(rows) == ["agreement"]
    row = rows["agreement"]
    assert row.verdict == "disagrees"
    assert row.ratio_p50 is None
    assert re.search(complaint, row.note)


def test_a_gradient_on_one_side_only_disagrees() -> None:
    class Cut(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    row = rows_of(case(Cut(), Scale()))["agreement"]
    assert row.note == "only one of the two has a gradient for input 0"


@pytest.mark.parametrize(("kinks", "agree"), [(1, True), (2, False)])
def test_one_gradient_in_a_thousand_may_stand_on_the_other_side_of_a_kink(kinks: int, agree: bool) -> None:
    class Kinked(Scale):
        def forward(self, x: Tensor) -> Tensor:
            flipped = torch.arange(len(x)) < kinks
            return super().forward(x) + torch.where(flipped, x - x.detach(), 0.0)

    rows = rows_of(case(Kinked(), Scale()))
    assert ("agreement" not in rows) == agree


def test_a_nan_gradient_disagrees() -> None:
    class BadGradient(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x * 0).sqrt()

    assert "differ by nan" in rows_of(case(BadGradient(), Scale()))["agreement"].note


def test_what_raises_is_reported_and_no_time_given() -> None:
    row = rows_of(case(Raises(), Scale()))["agreement"]
    assert (row.verdict, row.note) == ("failed", "RuntimeError: no such luck")


def test_noise_is_drawn_from_the_same_seed() -> None:
    assert rows_of(case(Noisy(), Noisy()))["forward"].ratio_p50 is not None


def test_a_difference_by_design_is_raced_and_its_reason_noted() -> None:
    reason = "rivals round otherwise"
    row = rows_of(case(Scale(error=1.0), Scale(), tolerance=None, why_not_equal=reason))["forward"]
    assert row.ratio_p50 is not None
    assert row.note == reason


def test_only_what_a_case_asks_for_is_measured() -> None:
    assert list(rows_of(case(Scale(), Scale(), quantities=("forward",)))) == ["forward"]
    assert list(rows_of(case(Scale(), Scale(), quantities=("saved",)))) == ["saved"]


def test_no_tolerance_needs_a_reason() -> None:
    with pytest.raises(InvalidArgument, match="why_not_equal: expected the reason why fake/1000 has no tolerance"):
        rows_of(case(Scale(), Scale(), tolerance=None))


def test_gradients_do_not_pile_up_on_the_modules() -> None:
    ours = Scale()
    rows_of(case(ours, Scale()))
    assert ours.factor.grad is None


class Rough(Scale):
    """Rounds what a low precision would keep, not so its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.dtype == torch.float32 else y + ((4 * y).round() / 4 - y).detach()


def test_in_low_precision_both_are_cast_and_compared_with_float32() -> None:
    ours, rival = Scale(), Scale()
    row = rows_of(case(ours, rival), dtype=torch.bfloat16)["forward"]
    assert row.dtype == "bfloat16"
    assert row.ratio_p50 is not None
    assert (ours.factor.dtype, rival.factor.dtype) == (torch.bfloat16, torch.bfloat16)
    worse = rows_of(case(Rough(), Scale()), dtype=torch.bfloat16)["agreement"]
    assert worse.verdict == "disagrees"
    assert re.search(r"output in torch.bfloat16 is off float32 by .*, twice the rival's", worse.note)
    assert "agreement" not in rows_of(case(Scale(), Rough()), dtype=torch.bfloat16)


def test_outputs_that_differ_by_design_have_to_be_finite_in_low_precision() -> None:
    settings = {"tolerance": None, "why_not_equal": "other tokens"}
    assert "agreement" not in rows_of(case(Rough(), Scale(), **settings), dtype=torch.bfloat16)
    row = rows_of(case(NotANumber(), Scale(), **settings), dtype=torch.bfloat16)["agreement"]
    assert row.note == "output is not finite"


def test_noise_is_the_same_in_every_precision() -> None:
    assert "agreement" not in rows_of(case(Noisy(), Noisy()), dtype=torch.bfloat16)


class TestOnAGpu:
    """With stand-ins for what asks the GPU."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[object] = []

        def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
            call()
            self.captured.append(call)
            return call

        monkeypatch.setattr(runner.gpu, "captured", captured)

    def test_graphs_are_timed_in_place_of_the_calls_and_save_nothing(self) -> None:
        rows = list(race(case(Scale(), Scale()), CPU, modes=("eager", "graph"), repeats=1))
        assert [(row.mode, row.quantity) for row in rows][3:] == [("graph", "forward"), ("graph", "forward+backward")]
        assert len(self.captured) == 4

    def test_what_cannot_be_captured_is_a_row_and_the_next_mode_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        monkeypatch.setattr(runner.gpu, "captured", refuses)
        monkeypatch.setattr(nn.Module, "compile", lambda module: None)
        rows = list(race(case(Scale(), Scale()), CPU, modes=("graph", "compiled"), repeats=1))
        assert (rows[0].mode, rows[0].verdict) == ("graph", "failed")
        assert rows[0].note == (
            "RuntimeError: narrows cannot be captured as a CUDA graph: "
            "RuntimeError: operation not permitted when stream is capturing"
        )
        assert [row.mode for row in rows[1:]] == ["compiled"] * 3

    def test_launches_and_peaks_are_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The device says "cuda" where the runner looks, and tensors stay here.
        cuda = torch.device("cuda")
        monkeypatch.setattr(runner.gpu, "kernels_of", lambda call, device: 61)
        monkeypatch.setattr(runner, "peak_memory", lambda call, device: 2**20)
        monkeypatch.setattr(runner, "describe", lambda device: {**describe(CPU), "device": "cuda"})
        monkeypatch.setattr(runner, "compare_speed", lambda calls, **_: compare_speed(calls, repeats=1))
        fair = case(Scale(), Scale())
        here = replace(fair, prepare=lambda device: fair.prepare(CPU))
        rows = list(race(here, cuda, modes=("eager", "graph")))
        assert [(row.narrows_launches, row.rival_peak) for row in rows] == [
            (61, 2**20), (61, 2**20), (None, None), (61, None), (61, None),
        ]  # fmt: skip
        head, _, first, *_ = table(rows).splitlines()
        assert head.split()[-2:] == ["launches", "peak"]
        assert re.search(r"61 / 61 +1 / 1 MiB$", first)

    def test_bfloat16_in_all_modes_is_what_runs_by_default(self, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(runner, "race", lambda case, device, **options: asked.append(options) or [])
        run("fake/a", device="cuda")
        run("fake/a", device="cuda", dtype="float32", modes=["compiled", "eager"])
        run("fake/a")  # on the GPU, since there is one
        run("fake/a", device="cpu")
        assert [(options["dtype"], options["modes"]) for options in asked] == [
            (torch.bfloat16, ["eager", "graph", "compiled"]),
            (torch.float32, ["eager", "compiled"]),
            (torch.bfloat16, ["eager", "graph", "compiled"]),
            (torch.float32, ["eager"]),
        ]


@pytest.mark.usefixtures("room")
class TestQuick:
    @pytest.fixture(autouse=True)
    def _usual(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "USUAL", ("other/a", "fake/a"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def test_usual_cases_in_their_order_and_compiled_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(
            runner, "race", lambda case, device, **options: asked.append((case.name, options["modes"])) or []
        )
        run(quick=True, device="cuda")
        uncompiled, compiled = ["eager", "graph"], ["compiled"]
        names = ("other/a", "fake/a")
        assert asked == [*((name, uncompiled) for name in names), *((name, compiled) for name in names)]

    def test_time_is_kept_and_what_was_not_reached_is_said(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def slow(case: BenchCase, device: torch.device, **_: object) -> Iterator[Row]:
            while True:
                time.sleep(0.01)
                yield from ()

        monkeypatch.setattr(runner, "race", slow)
        monkeypatch.setattr(runner, "QUICK_SECONDS", 0.5)
        monkeypatch.setattr(runner, "LEAST_SECONDS", 0.3)
        start = time.monotonic()
        assert run(quick=True, device="cpu") == []
        assert time.monotonic() - start < 5
        assert "Not measured within the time: other/a (eager; begun); fake/a (eager)" in capsys.readouterr().err

    def test_every_usual_case_exists_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        names = [case.name for case in find_cases(device="cuda")]
        assert set(runner.USUAL) <= set(names)
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"modes": ["graph"]}, "modes: expected some of eager, compiled on cpu, got graph"),
        ({"dtype": "int8"}, "dtype: expected one of bfloat16, float16, float32, got 'int8'"),
    ],
    ids=["mode", "dtype"],
)
def test_modes_and_dtypes_that_there_are_not(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        run(**options)


@pytest.mark.compiled
def test_compiled_rows_follow_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    ours, rival = Scale(), Scale()
    rows = list(race(case(ours, rival, targets={"forward": 0.0}), CPU, modes=("eager", "compiled"), repeats=1))
    assert [(row.mode, row.quantity) for row in rows] == [
        (mode, quantity) for mode in ("eager", "compiled") for quantity in ("forward", "forward+backward", "saved")
    ]
    assert compiled == [ours, rival]
    assert [row.verdict for row in rows] == ["met", "", "", "", "", ""]


def test_a_row_says_where_it_was_measured() -> None:
    row = rows_of(case(Scale(), Scale()))["forward"]
    assert (row.device, row.torch, row.narrows) == ("cpu", torch.__version__, narrows.__version__)
    assert row.threads == torch.get_num_threads()
    assert row.cores >= 1
    assert row.hardware
    assert (row.shapes, row.dtype, row.mode) == ("1000", "float32", "eager")


def test_the_rivals_version_is_that_of_its_package() -> None:
    assert rival_version(nn.Linear(1, 1)) == f"torch {torch.__version__}"
    slot_attention = pytest.importorskip("slot_attention")
    assert rival_version(nn.Sequential(slot_attention.SlotAttention(2, 8))) == "slot-attention 1.5.2"


def test_outside_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert describe(CPU)["commit"] == ""


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A room with one file of cases, in place of narrows' own."""
    (tmp_path / "zz_fake.py").write_text(
        "from tests.bench.test_runner import Scale, case\n"
        "from dataclasses import replace\n"
        "CASES = [replace(case(Scale(), Scale()), name=name) for name in ('fake/a', 'fake/b', 'other/a')]\n"
    )
    (tmp_path / "zz_no_cases.py").write_text("")
    monkeypatch.setattr(narrows.bench, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("narrows.bench.zz_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("room")
class TestFinding:
    def test_by_wildcard(self) -> None:
        assert [case.name for case in find_cases()] == ["fake/a", "fake/b", "other/a"]
        assert [case.name for case in find_cases("fake/*")] == ["fake/a", "fake/b"]

    def test_by_device(self, room: Path) -> None:
        with (room / "zz_fake.py").open("a") as file:
            file.write("CASES = [replace(CASES[0], device='cuda'), replace(CASES[1], device='cpu'), CASES[2]]\n")
        assert [case.name for case in find_cases(device="cpu")] == ["fake/b", "other/a"]
        assert [case.name for case in find_cases(device="cuda")] == ["fake/a", "other/a"]
        assert [row.case for row in run("*/a", repeats=1)] == ["other/a"] * 3

    def test_nothing_found(self) -> None:
        with pytest.raises(InvalidArgument, match=r"pattern: expected one that matches a case: fake/\*.* got 'fakes'"):
            find_cases("fakes")

    def test_run_names_and_records_rows_as_they_come(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        seen: list[Row] = []
        monkeypatch.setattr(runner, "record_rows", lambda rows, folder: seen.extend(rows))
        rows = run("fake/*", repeats=1, record=tmp_path)
        assert rows == seen
        assert [row.case for row in rows] == ["fake/a"] * 3 + ["fake/b"] * 3
        printed = capsys.readouterr().err
        assert "fake/a (eager): forward" in printed
        assert f"Recorded in {tmp_path}" in printed


def test_a_missing_rival_is_named_with_what_to_install(room: Path) -> None:
    (room / "zz_fake.py").write_text("import a_rival_nobody_has\n")
    with pytest.raises(
        MissingRival, match=r"a_rival_nobody_has is needed .* pip install slot-attention soft-moe"
    ) as info:
        find_cases()
    assert isinstance(info.value, NarrowsError)
    assert isinstance(info.value, ImportError)


def test_a_rival_may_be_missing_in_prepare_too() -> None:
    def prepare(device: torch.device) -> Contest:
        import a_rival_nobody_has  # pyright: ignore[reportMissingImports]

        return a_rival_nobody_has

    with pytest.raises(MissingRival, match="a_rival_nobody_has"):
        rows_of(replace(case(Scale(), Scale()), prepare=prepare))


def test_a_fault_of_narrows_itself_is_not_blamed_on_a_rival(room: Path) -> None:
    (room / "zz_fake.py").write_text("import narrows.nowhere\n")
    with pytest.raises(ModuleNotFoundError, match=r"narrows\.nowhere") as info:
        find_cases()
    assert not isinstance(info.value, MissingRival)


MAPPED = """
import ctypes
import torch
from narrows.bench.runner import settle_allocator

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

def mapped_afresh():
    before = mallinfo2().hblkhd
    blocks = [torch.empty(2**20) for _ in range(6)]
    return mallinfo2().hblkhd - before

before = mapped_afresh()
settle_allocator()
print(before, mapped_afresh())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="other C libraries have other rules")
def test_what_a_case_frees_it_finds_again() -> None:
    printed = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True).stdout
    before, after = map(int, printed.split())
    assert before > 6 * 2**22
    assert after == 0
