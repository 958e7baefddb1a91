"""Runs benchmark cases: first that both compute the same, then how fast each is and what it keeps for backward."""

import importlib
import pkgutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from pathlib import Path
from threading import current_thread, main_thread
from time import monotonic
from typing import NamedTuple

import torch
from torch import nn

import narrows.bench
from narrows.bench import gpu
from narrows.bench.agreement import SEED, disagreement, precision_lost, result_of
from narrows.bench.case import BenchCase, Contest
from narrows.bench.rows import Row, describe, rival_version
from narrows.bench.rows import record as record_rows
from narrows.costs import Spread, compare_speed, peak_memory, saved_for_backward
from narrows.errors import InvalidArgument, NarrowsError
from narrows.files import check_writable
from narrows.screen import say
from narrows.validation import check_device, check_positive

MODES = ("eager", "graph", "compiled")
DTYPES = ("bfloat16", "float16", "float32")
# Six minutes, less what comes before a quick run and what in it cannot be stopped at once; and too little to begin.
QUICK_SECONDS, LEAST_SECONDS = 320.0, 5.0
# What a quick run races, in this order.
USUAL = (
    "slot_attention/SlotAttention/64x1369x256/slots7",
    "slot_attention/SlotAttention/64x4096x256/slots16",
    "slot_attention/SlotAttentionExperimental/16x4096x256/slots16",
    "perceiver_resampler/16x4x256x1024",
    "masked_cross_attention/4x2048x2048/32-media/equal",
    "soft_moe/dynamic/64x196x384/experts28",
    "soft_moe/fixed/64x256x768/experts128x2",
    "sepvit/96-192-384-768/224px/batch64",
    "sepvit_tiny/swin_tiny_patch4_window7_224/224px/batch128",
    "token_sampling/vit/224px/batch128",
    *(f"token_reduction/deit_small/224px/batch256/{method}" for method in ("topk", "ats", "tome")),
    "token_reduction/deit_small/224px/batch1/topk",
    *(f"token_reduction/vit_large/384px/batch64/{method}" for method in ("topk", "ats", "tome")),
)
RIVALS = "slot-attention soft-moe-pytorch vit-pytorch flamingo-pytorch timm"


class MissingRival(NarrowsError, ImportError):
    """A package that narrows is raced against is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"{package} is needed to race narrows against it and is not installed. "
            f"Install the packages narrows is raced against with: pip install {RIVALS}"
        )


def find_cases(pattern: str = "*", *, device: str | None = None) -> list[BenchCase]:
    """The cases in the files of this room whose names match the shell wildcard `pattern`.

    Args:
        pattern: shell wildcard over the names of cases.
        device: "cpu" or "cuda" for those that run there; None for all.

    Raises:
        InvalidArgument: no case matches.
        MissingRival: a package to race against is not installed.
    """
    names = [info.name for info in pkgutil.iter_modules(narrows.bench.__path__, f"{narrows.bench.__name__}.")]
    with _rivals_needed():
        cases = [case for name in sorted(names) for case in getattr(importlib.import_module(name), "CASES", ())]
    cases = [case for case in cases if device is None or case.device in (None, device)]
    chosen = [case for case in cases if fnmatchcase(case.name, pattern)]
    if not chosen:
        families = dict.fromkeys(f"{case.name.partition('/')[0]}/*" for case in cases)
        raise InvalidArgument("pattern", expected=f"one that matches a case: {', '.join(families)}", got=repr(pattern))
    return chosen


def run(
    pattern: str = "*",
    *,
    device: str = "auto",
    dtype: str | None = None,
    modes: Sequence[str] = (),
    repeats: int = 9,
    quick: bool = False,
    record: str | Path | None = None,
) -> list[Row]:
    """Time narrows and its rivals side by side, interleaved, after checking that both compute the same.

    Each row is named on stderr, and recorded, as soon as it is there: a run that is cut short keeps what it has.

    Args:
        pattern: shell wildcard over the names of cases, for instance "slot_attention/*".
        device: "auto", "cpu", "cuda" or "cuda:1": where both run.
        dtype: in what precision both run, checked against float32; bfloat16 on CUDA and float32 elsewhere if None.
        modes: "eager", "graph" (captured as a CUDA graph) and "compiled"; all three on CUDA and eager elsewhere if
            empty.
        repeats: samples of each time.
        quick: end within six minutes: the usual sizes on a GPU, first eager and captured, then compiled as far as time
            allows.
        record: folder in which the rows are kept as CSV.

    Raises:
        InvalidArgument: no case matches, a case with no tolerance gives no reason, or no such mode or dtype here.
        CannotWrite: `record` cannot be written.
        MissingRival: a package to race against is not installed.
    """
    if record is not None:
        check_writable(record, folder=True)
    check_positive(repeats=repeats)
    started, place = monotonic(), check_device(device)
    if place.type == "mps":
        raise InvalidArgument("device", expected="'cpu' or 'cuda', whose work can be timed", got="'mps'")
    modes, kind = _modes(modes, place), _dtype(dtype, place)
    cases = find_cases(pattern, device=place.type)
    if quick:
        usual = {name: index for index, name in enumerate(USUAL)}
        cases = sorted((case for case in cases if case.name in usual), key=lambda case: usual[case.name]) or cases
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        say(f"{row.case} ({row.mode}): {row.quantity} {row.verdict}".rstrip())
        if record is not None:
            record_rows([row], record)

    unreached: list[str] = []
    # Compiling takes longer than all the rest: what it would keep from being measured comes before it.
    parts = [[mode for mode in modes if mode != "compiled"], [mode for mode in modes if mode == "compiled"]]
    for part in filter(None, parts if quick else [modes]):
        for case in cases:
            left = QUICK_SECONDS - (monotonic() - started) if quick else None
            if left is not None and left < LEAST_SECONDS:
                unreached.append(f"{case.name} ({', '.join(part)})")
                continue
            try:
                # Half of what is left: no case takes all of it from those behind.
                with _at_most(None if left is None else left / 2):
                    for row in race(case, place, modes=part, repeats=repeats, dtype=kind, quick=quick):
                        take(row)
            except _OutOfTime:
                unreached.append(f"{case.name} ({', '.join(part)}; begun)")
    if unreached:
        say(f"Not measured within the time: {'; '.join(unreached)}")
    if record is not None:
        say(f"Recorded in {record}")
    return rows


def race(
    case: BenchCase,
    device: torch.device,
    *,
    modes: Sequence[str] = ("eager",),
    repeats: int = 9,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> Iterator[Row]:
    """The rows of one case, mode by mode.

    Where outputs or gradients disagree, or one of the two raises, a single row says so and no ratio is given. Targets
    are set for eager code on a CPU and judged there only. A `quick` race takes fewer samples of what is slow.
    """
    settle_allocator()
    torch.manual_seed(SEED)
    with _rivals_needed():
        contest = case.prepare(device)
    if contest.tolerance is None and not case.why_not_equal:
        raise InvalidArgument("why_not_equal", expected=f"the reason why {case.name} has no tolerance", got="nothing")
    for tensor in contest.inputs:
        tensor.requires_grad_()
    row = partial(
        Row,
        **describe(device),
        rival_version=rival_version(contest.rival),
        case=case.name,
        rival=case.rival,
        shapes=" ".join("x".join(map(str, tensor.shape)) for tensor in contest.inputs),
        dtype=str(dtype).removeprefix("torch."),
    )
    try:
        complaint = _checked(contest, dtype)
    except Exception as error:  # Whatever either of the two raises is the outcome of this race, not of the next.
        yield row(mode=modes[0], quantity="agreement", unit="", verdict="failed", note=_first_line(error))
        return
    if complaint:
        yield row(mode=modes[0], quantity="agreement", unit="", verdict="disagrees", note=complaint)
        return
    for mode in modes:
        if mode == "compiled":
            torch._dynamo.reset()
            contest.narrows.compile()
            contest.rival.compile()
        try:
            measured = _measure(contest, device, mode, case.quantities, repeats, limit=2.0 if quick else None)
        except Exception as error:
            yield row(mode=mode, quantity="agreement", unit="", verdict="failed", note=_first_line(error))
            continue
        for quantity, found in measured.items():
            ratio = Spread(tuple(map(_ratio, found.rival.samples, found.narrows.samples)))
            target = case.targets.get(quantity) if mode == "eager" and device.type == "cpu" else None
            yield row(
                mode=mode,
                quantity=quantity,
                unit=found.unit,
                verdict="" if target is None else "met" if ratio.p80 >= target else "missed",
                target=target,
                note=case.why_not_equal,
                **_quantiles("narrows", found.narrows),
                **_quantiles("rival", found.rival),
                **_quantiles("ratio", ratio),
                **found.on_gpu,
            )


def _modes(modes: Sequence[str], device: torch.device) -> list[str]:
    """Those asked for, or all that run on the device, in the order in which they are run."""
    here = MODES if device.type == "cuda" else tuple(mode for mode in MODES if mode != "graph")
    unknown = [mode for mode in modes if mode not in here]
    if unknown:
        raise InvalidArgument("modes", expected=f"some of {', '.join(here)} on {device.type}", got=unknown[0])
    chosen = modes or (MODES if device.type == "cuda" else MODES[:1])
    return [mode for mode in MODES if mode in chosen]


def _dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InvalidArgument("dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(dtype))
    return getattr(torch, dtype)


class _OutOfTime(BaseException):
    """Ends a race from outside; no exception of it, which would be its result."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raises `_OutOfTime` in what takes longer, where the system has a timer for it."""
    if seconds is None or not hasattr(signal, "setitimer") or current_thread() is not main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def settle_allocator() -> None:
    """Let the C library keep the memory that is freed, as it does in a process that has run for a while.

    glibc maps large blocks afresh, page fault by page fault, and hands free memory back. What is large, it learns from
    the blocks that were freed, up to 32 MiB. Otherwise the cases that ran before would decide the time of the next.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _checked(contest: Contest, dtype: torch.dtype) -> str:
    """What speaks against a race in that precision, which both are in afterwards; empty where nothing does."""
    exact = None
    with _exact_convolutions():
        complaint = disagreement(contest)
        if not complaint and contest.tolerance is not None and contest.continuous and dtype != torch.float32:
            exact = result_of(contest, contest.rival)
    if complaint or dtype == torch.float32:
        return complaint
    for module in (contest.narrows, contest.rival):
        module.to(dtype)
    for tensor in (*contest.inputs, *contest.others):  # in place: the call holds them
        tensor.data = tensor.data.to(dtype)
    return precision_lost(contest, exact)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """float32 as such, where cuDNN would round to the 10 bits of TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class _Measured(NamedTuple):
    unit: str
    narrows: Spread
    rival: Spread
    on_gpu: dict[str, int | None]


def _measure(
    contest: Contest,
    device: torch.device,
    mode: str,
    quantities: tuple[str, ...],
    repeats: int,
    limit: float | None,
) -> dict[str, _Measured]:
    """Unit, narrows' samples and the rival's of each quantity, and on a GPU launches and peak memory."""

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            contest.call(module)

    def step(module: nn.Module) -> None:
        # As training does it: gradients are brought into the layout of their parameters where they are not in it.
        output = contest.call(module)
        output.backward(torch.ones_like(output))
        for leaf in (*contest.inputs, *module.parameters()):
            leaf.grad = None

    def saved(module: nn.Module) -> Spread:
        outside = (*contest.inputs, *module.parameters(), *module.buffers())
        return Spread((float(saved_for_backward(partial(contest.call, module), exclude=outside)),))

    measured: dict[str, _Measured] = {}
    for quantity, function in (("forward", forward), ("forward+backward", step)):
        if quantity not in quantities:
            continue
        contenders = {"narrows": partial(function, contest.narrows), "rival": partial(function, contest.rival)}
        on_gpu: dict[str, int | None] = {}
        if mode == "graph":
            contenders = {name: _captured(name, call, device) for name, call in contenders.items()}
        timings = compare_speed(contenders, repeats=repeats, device=device, limit=limit)
        if device.type == "cuda":
            for name, call in contenders.items():
                on_gpu[f"{name}_launches"] = gpu.kernels_of(call, device)
                # A graph holds its memory all the time.
                on_gpu[f"{name}_peak"] = None if mode == "graph" else peak_memory(call, device)
        measured[quantity] = _Measured("s", timings["narrows"], timings["rival"], on_gpu)
    if "saved" in quantities and mode != "graph":
        measured["saved"] = _Measured("bytes", saved(contest.narrows), saved(contest.rival), {})
    return measured


def _captured(name: str, call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    try:
        return gpu.captured(call, device)
    except Exception as error:
        raise RuntimeError(f"{name} cannot be captured as a CUDA graph: {_first_line(error)}") from error


def _ratio(theirs: float, ours: float) -> float:
    """Theirs over ours, where both may be nothing."""
    if ours:
        return theirs / ours
    return inf if theirs else 1.0


def _quantiles(name: str, spread: Spread) -> dict[str, float]:
    return {f"{name}_p20": spread.p20, f"{name}_p50": spread.median, f"{name}_p80": spread.p80}


@contextmanager
def _rivals_needed() -> Iterator[None]:
    """Turns the absence of a package that is no part of narrows into `MissingRival`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "narrows":
            raise
        raise MissingRival(error.name) from error
