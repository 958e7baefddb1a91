"""Runs benchmark cases: first that both compute the same, then how fast each is and what it keeps for backward."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import narrows.bench
from narrows.bench.case import BenchCase, Contest
from narrows.bench.rows import Row, describe, rival_version
from narrows.bench.rows import record as record_rows
from narrows.errors import InvalidArgument, NarrowsError
from narrows.measure import Spread, compare_speed, saved_for_backward

SEED = 0
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
        raise InvalidArgument("pattern", expected=f"a match for any of {[c.name for c in cases]}", got=repr(pattern))
    return chosen


def run(
    pattern: str = "*",
    *,
    device: str = "cpu",
    compile: bool | None = None,
    repeats: int = 9,
    record: str | Path | None = None,
) -> list[Row]:
    """Time narrows and its rivals side by side, interleaved, after checking that both compute the same.

    Each row is named on stderr, and recorded, as soon as it is there: a run that is cut short keeps what it has.

    Args:
        pattern: shell wildcard over the names of cases, for instance "slot_attention/*".
        device: where both run.
        compile: race both under torch.compile too; by default on CUDA only.
        repeats: samples of each time.
        record: folder in which the rows are kept as CSV.

    Raises:
        InvalidArgument: no case matches, or a case with no tolerance gives no reason.
        MissingRival: a package to race against is not installed.
    """
    place = torch.device(device)
    modes = ("eager", "compiled") if compile or (compile is None and place.type == "cuda") else ("eager",)
    rows: list[Row] = []
    for case in find_cases(pattern, device=place.type):
        for row in race(case, place, modes=modes, repeats=repeats):
            rows.append(row)
            print(f"{row.case} ({row.mode}): {row.quantity} {row.verdict}".rstrip(), file=sys.stderr, flush=True)
            if record is not None:
                record_rows([row], record)
    if record is not None:
        print(f"Recorded in {record}", file=sys.stderr)
    return rows


def race(
    case: BenchCase, device: torch.device, *, modes: tuple[str, ...] = ("eager",), repeats: int = 9
) -> Iterator[Row]:
    """The rows of one case, mode by mode.

    Where outputs or gradients disagree, or one of the two raises, a single row says so and no ratio is given. Targets
    are set for eager code on a CPU and judged there only.
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
        dtype=str(next(iter(contest.inputs or contest.narrows.parameters())).dtype).removeprefix("torch."),
    )
    for mode in modes:
        if mode == "compiled":
            torch._dynamo.reset()
            contest.narrows.compile()
            contest.rival.compile()
        try:
            complaint = _disagreement(contest)
            if complaint:
                yield row(mode=mode, quantity="agreement", unit="", verdict="disagrees", note=complaint)
                continue
            measured = _measure(contest, device, repeats, case.quantities)
        except Exception as error:  # Whatever either of the two raises is the outcome of this race, not of the next.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            yield row(mode=mode, quantity="agreement", unit="", verdict="failed", note=reason)
            continue
        for quantity, (unit, ours, theirs) in measured.items():
            ratio = Spread(tuple(map(_ratio, theirs.samples, ours.samples)))
            target = case.targets.get(quantity) if mode == "eager" and device.type == "cpu" else None
            yield row(
                mode=mode,
                quantity=quantity,
                unit=unit,
                verdict="" if target is None else "met" if ratio.p80 >= target else "missed",
                target=target,
                note=case.why_not_equal,
                **_quantiles("narrows", ours),
                **_quantiles("rival", theirs),
                **_quantiles("ratio", ratio),
            )


def settle_allocator() -> None:
    """Let the C library keep the memory that is freed, as it does in a process that has run for a while.

    glibc maps large blocks afresh, page fault by page fault, and hands free memory back. What is large, it learns from
    the blocks that were freed, up to 32 MiB. Otherwise the cases that ran before would decide the time of the next.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class _Result(NamedTuple):
    output: Tensor
    gradients: tuple[Tensor | None, ...]


def _result(contest: Contest, module: nn.Module) -> _Result:
    torch.manual_seed(SEED)
    output = contest.call(module)
    if not contest.inputs:
        return _Result(output.detach(), ())
    torch.manual_seed(SEED)
    gradients = torch.autograd.grad(output, contest.inputs, torch.randn_like(output), allow_unused=True)
    return _Result(output.detach(), gradients)


def _disagreement(contest: Contest) -> str:
    """How outputs or input gradients of the two differ beyond the tolerance; empty where they do not."""
    if contest.tolerance is None:
        return ""
    ours, theirs = _result(contest, contest.narrows), _result(contest, contest.rival)
    if ours.output.shape != theirs.output.shape:
        return f"output has shape {tuple(ours.output.shape)}, the rival's {tuple(theirs.output.shape)}"
    off = _difference(ours.output, theirs.output)
    if not off <= contest.tolerance:
        return f"outputs differ by {off:.2e}, allowed {contest.tolerance:.0e}"
    for index, (our, their) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        if our is None or their is None:
            if our is not their:
                return f"only one of the two has a gradient for input {index}"
            continue
        off = _difference_of_most(our, their) / max(their.abs().max().item(), torch.finfo(their.dtype).tiny)
        if not off <= contest.tolerance:
            return f"gradients of input {index} differ by {off:.2e} of the largest, allowed {contest.tolerance:.0e}"
    return ""


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Greatest absolute difference; NaN, which is within no tolerance, where either has one."""
    return (ours - theirs).abs().max().item()


def _difference_of_most(ours: Tensor, theirs: Tensor) -> float:
    """Greatest absolute difference but for one number in a thousand; NaN where any has one.

    Where the input of a ReLU is 0 but for rounding, its slope is 0 in the one and 1 in the other.
    """
    differences = (ours - theirs).abs().flatten()
    if differences.isnan().any():
        return float("nan")
    return differences.kthvalue(len(differences) - len(differences) // 1000).values.item()


def _measure(
    contest: Contest, device: torch.device, repeats: int, quantities: tuple[str, ...]
) -> dict[str, tuple[str, Spread, Spread]]:
    """Unit, narrows' samples and the rival's, of each quantity."""

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

    measured: dict[str, tuple[str, Spread, Spread]] = {}
    for quantity, function in (("forward", forward), ("forward+backward", step)):
        if quantity not in quantities:
            continue
        contenders = {"narrows": partial(function, contest.narrows), "rival": partial(function, contest.rival)}
        timings = compare_speed(contenders, repeats=repeats, device=device)
        measured[quantity] = ("s", timings["narrows"], timings["rival"])
    if "saved" in quantities:
        measured["saved"] = ("bytes", saved(contest.narrows), saved(contest.rival))
    return measured


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
