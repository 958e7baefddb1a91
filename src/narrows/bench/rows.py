"""What a benchmark leaves behind: rows that say where and how they were measured, kept as CSV and read as a table."""

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrows import __version__
from narrows.errors import InvalidArgument
from narrows.files import replacing
from narrows.visualize import Cell, text_table


@dataclass(frozen=True)
class Row:
    """One quantity of one case: narrows against its rival. benchmarks/README.md says what each column means."""

    date: str
    hardware: str
    device: str
    cores: int
    threads: int
    narrows: str
    commit: str
    torch: str
    rival_version: str
    case: str
    rival: str
    shapes: str
    dtype: str
    mode: str
    quantity: str
    unit: str
    verdict: str
    narrows_p20: float | None = None
    narrows_p50: float | None = None
    narrows_p80: float | None = None
    rival_p20: float | None = None
    rival_p50: float | None = None
    rival_p80: float | None = None
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None
    target: float | None = None
    note: str = ""
    narrows_launches: int | None = None
    rival_launches: int | None = None
    narrows_peak: int | None = None
    rival_peak: int | None = None


COLUMNS = tuple(field.name for field in fields(Row))


def record(rows: Iterable[Row], folder: str | Path) -> list[Path]:
    """Append rows to `<folder>/<hardware>.csv`, one file per machine; the files written.

    Raises:
        InvalidArgument: a file is there already and has other columns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_file: dict[Path, list[Row]] = {}
    for row in rows:
        cores = f" {row.cores} cores" if row.device == "cpu" else ""
        by_file.setdefault(folder / f"{_slug(row.hardware + cores)}.csv", []).append(row)
    for path in by_file:
        _check_columns(path)
    for path, of_file in by_file.items():
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            file.write(before)
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not before:
                writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in of_file)
    return list(by_file)


def table(rows: Sequence[Row]) -> str:
    """Rows as text: medians of both, their ratio with its 20th and 80th percentile, the target and the verdict.

    Rows of a GPU also say how many kernels are launched and the peak of memory, each "rival / narrows".
    """
    return "\n".join((text_table(*cells(rows)), *notes(rows)))


def cells(rows: Sequence[Row]) -> tuple[list[str], list[tuple[object, ...]]]:
    """The heads of `table`, of which the first is the case, and its rows."""
    head = ("case", "mode", "quantity", "rival", "narrows", "ratio", "target", "verdict")
    on_gpu = ("launches", "peak") if any(row.device == "cuda" for row in rows) else ()
    return [*head, *on_gpu], [(*_cells(row), *_on_gpu(row)[: len(on_gpu)]) for row in rows]


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be said below a table, each once."""
    return list(dict.fromkeys(f"{row.case} ({row.mode}): {row.note}" for row in rows if row.note))


def _on_gpu(row: Row) -> tuple[str, str]:
    launches = peak = ""
    if row.rival_launches is not None and row.narrows_launches is not None:
        launches = f"{row.rival_launches} / {row.narrows_launches}"
    if row.rival_peak is not None and row.narrows_peak is not None:
        peak = f"{row.rival_peak / 2**20:.0f} / {row.narrows_peak / 2**20:.0f} MiB"
    return launches, peak


def _cells(row: Row) -> tuple[object, ...]:
    ratio = None
    if row.ratio_p50 is not None:
        spread = f" ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})" if row.unit == "s" else ""
        ratio = Cell(row.ratio_p50, f"{row.ratio_p50:.2f}{spread}")
    target = None if row.target is None else Cell(row.target, f"{row.target:g}")
    rival, ours = (_readable(value, row.unit) for value in (row.rival_p50, row.narrows_p50))
    return row.case, row.mode, row.quantity, rival, ours, ratio, target, row.verdict


def _readable(value: float | None, unit: str) -> Cell | None:
    if value is None:
        return None
    return Cell(value, f"{value * 1e3:.3g} ms" if unit == "s" else f"{value / 2**20:.3g} MiB")


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _check_columns(path: Path) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise InvalidArgument(
            "folder",
            expected=f"{path} to have the columns {', '.join(COLUMNS)}",
            got=", ".join(header) or "an empty file",
            hint="Move that file away; its rows come from another version of narrows.",
        )


def describe(device: torch.device) -> dict[str, Any]:
    """Where, when and with which versions a row is measured: its columns that no case decides."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "narrows": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
    }


def rival_version(rival: nn.Module) -> str:
    """Name and version of the package that `rival` comes from, or whose modules it holds: "slot-attention 1.5.2"."""
    for module in rival.modules():
        package = type(module).__module__.partition(".")[0]
        if package in ("torch", "narrows", "builtins", "__main__"):
            continue
        for distribution in _distributions().get(package, ()):
            return f"{distribution.replace('_', '-')} {version(distribution)}"
    return f"torch {torch.__version__}"


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def processor() -> str:
    """Its name, on x86 its family and model, and the vector extension that PyTorch uses: for the record.

    Clouds give one name to processors that differ by a factor of two.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or platform.machine()
    generation = f"family {fields['cpu family']} model {fields['model']} " if "cpu family" in fields else ""
    return f"{name} {generation}{torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """The commit this source stands at, "+" after it where the source has changed since; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")  # not the rows that are being recorded
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    """What git says of the package's folder."""
    package = Path(__file__).parents[1]
    return subprocess.run(("git", *arguments), cwd=package, capture_output=True, text=True, check=True).stdout.strip()
