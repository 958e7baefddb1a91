"""The commands that call one function of `narrows.jobs` or `narrows.bench`: signature and help are the function's."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from narrows.cli import answer
from narrows.cli.parsing import call
from narrows.errors import InvalidArgument, Terminated
from narrows.visualize.tables import ScreenTable

if TYPE_CHECKING:
    from narrows.jobs.comparison import Comparison
    from narrows.jobs.reduce import ReductionResult


def compare(arguments: list[str]) -> None:
    """Train, compare and report."""
    from narrows.jobs import compare as job

    found = call(job.compare, arguments)
    answer(
        "compare",
        lambda: _compared(found),
        ScreenTable(found.columns, found.rows()),
        found.verdict,
        f"Report: {found.report}",
    )
    if found.interrupted:
        kept = f"The models that were finished are in {found.folder}. {job.go_on(found.folder)}"
        raise Terminated(found.interrupted, kept)


def _compared(found: "Comparison") -> Mapping[str, Any]:
    models = [
        {
            "model": name,
            "accuracy": fmean(found.accuracies(name)),
            "margin": found.margin(name),
            "accuracies": found.accuracies(name),
            "macs": cost.cost.macs,
            "tokens": cost.tokens,
            "carriers": cost.carried,
            "train_images_per_second": cost.cost.batch / cost.training.median,
            "infer_images_per_second": cost.cost.throughput.median,
            "train_memory_bytes": cost.memory,
            "parameters": cost.cost.parameters,
        }
        for name, cost in found.costs.items()
    ]
    return {
        "models": models,
        "best": found.best,
        "verdict": found.verdict,
        "unfinished": found.unfinished,
        "diverged": [{"model": model, "seed": seed} for model, seed in found.diverged],
        "folder": found.folder,
        "report": found.report,
    }


def reduce(arguments: list[str]) -> None:
    """Measure and report."""
    from narrows.jobs import reduce as job

    found = call(job.reduce, arguments)
    answer(
        "reduce",
        lambda: _reduced(found),
        ScreenTable(found.columns, found.rows(), names=2),
        found.verdict,
        f"Chosen: {found.chosen.name} ({found.why})",
        *(f"{what}: {path}" for what, path in found.written.items()),
        f"Report: {found.report}",
    )


def _reduced(found: "ReductionResult") -> Mapping[str, Any]:
    chosen = found.chosen.reduction
    trials = [
        {
            "method": trial.method,
            "budget": trial.budget or None,
            "accuracy": trial.accuracy,
            "agreement": trial.agreement,
            "tokens": found.tokens,
            "kept_tokens": trial.kept if trial.reduction is not None else found.tokens,
            "macs": fmean(trial.macs),
            "images_per_second": trial.throughput.median,
            "speedup": trial.timing.times_faster_than(found.untouched.timing).median,
            "memory_bytes": trial.memory,
        }
        for trial in found.trials
    ]
    return {
        "model": found.untouched.model.name,
        "trials": trials,
        "chosen": {
            "method": found.chosen.method,
            "budget": found.chosen.budget,
            "schedule": list(chosen.schedule) if chosen is not None else None,
        },
        "why": found.why,
        "verdict": found.verdict,
        "written": {what.lower(): path for what, path in found.written.items()},
        "folder": found.folder,
        "report": found.report,
    }


def discover(arguments: list[str]) -> None:
    """Find objects, score and report."""
    from narrows.jobs import discover as job

    found = call(job.discover, arguments)

    def data() -> Mapping[str, Any]:
        runs = [asdict(run) for run in found.runs]
        known = {name: getattr(found, name) for name in ("verdict", "held_out", "folder", "report")}
        return {"runs": runs, **known}

    answer("discover", data, ScreenTable(found.columns, found.rows()), found.verdict, f"Report: {found.report}")


def export(arguments: list[str]) -> None:
    """Write a model for other runtimes, and say how far it is from the original."""
    from narrows.jobs import export as job

    found = call(job.export, arguments)

    def data() -> Mapping[str, Any]:
        sizes = [
            {"height": height, "width": width, "difference": difference}
            for (height, width), difference in found.differences.items()
        ]
        known = {name: getattr(found, name) for name in ("what", "runtime", "scale", "notes")}
        return {"file": found.path, **known, "differences": sizes}

    answer("export", data, str(found))


def show(arguments: list[str]) -> None:
    """Draw pictures; of a folder alone say which models are in it."""
    from narrows.jobs import show as job

    def models(names: Iterable[str | Path]) -> list[Mapping[str, Any]]:
        return [{"model": name, "architecture": job.models_in(name).get(Path(name))} for name in names]

    if len(arguments) == 2 and (folder := Path(arguments[1])).is_dir():
        known = job.models_in(folder)
        if not known:
            expected = "a folder with a model, or that of a run of `narrows fit`, `compare` or `discover`"
            raise InvalidArgument("model", expected=expected, got=repr(str(folder)))
        width = max(len(str(place)) for place in known)
        lines = [f"{place!s:<{width}}  {architecture}" for place, architecture in known.items()]
        further = f"Draw where tokens go in them: narrows show {folder} <images, folders of them, or digits>"
        answer("show", lambda: {"models": models(known), "pictures": []}, *lines, further)
        return
    found = call(job.show, arguments, several="images")

    def data() -> Mapping[str, Any]:
        return {"models": models(found.models), "pictures": found.pictures, "folder": found.folder}

    answer("show", data, f"Pictures of {found.images} images are in {found.folder}")


def generate(arguments: list[str]) -> None:
    """Write."""
    from narrows.jobs import generate as job

    written = call(job.generate, arguments)
    answer("generate", lambda: {"text": written}, written)


def bench(arguments: list[str]) -> None:
    """Race, print and record."""
    from narrows.bench import rows, runner

    found = call(runner.run, arguments, first="pattern")
    tables = []
    for case, of_case in groupby(found, key=lambda row: row.case):
        heads, cells = rows.cells(list(of_case))
        tables.append(ScreenTable(dict.fromkeys(heads[1:]), [each[1:] for each in cells], names=2, title=case))
    answer("bench", lambda: {"rows": [asdict(row) for row in found]}, *tables, *rows.notes(found))
