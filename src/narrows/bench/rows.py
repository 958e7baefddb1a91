"""What a benchmark leaves behind: rows, kept as CSV and read as a table."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from narrows.errors import InvalidArgument


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
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in of_file)
    return list(by_file)


def table(rows: Sequence[Row]) -> str:
    """Rows as text: medians of both, their ratio with its 20th and 80th percentile, the target and the verdict."""
    head = ("case", "mode", "quantity", "rival", "narrows", "ratio", "target", "verdict")
    lines = [head, *(_line(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = dict.fromkeys(f"{row.case} ({row.mode}): {row.note}" for row in rows if row.note)
    return "\n".join((text[0], "  ".join("-" * width for width in widths), *text[1:], *notes))


def _line(row: Row) -> tuple[str, ...]:
    ratio = f"{row.ratio_p50:.2f}" if row.ratio_p50 is not None else ""
    if row.unit == "s" and row.ratio_p50 is not None:
        ratio += f" ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
    target = "" if row.target is None else f"{row.target:g}"
    rival, ours = (_readable(value, row.unit) for value in (row.rival_p50, row.narrows_p50))
    return (row.case, row.mode, row.quantity, rival, ours, ratio, target, row.verdict)


def _readable(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.3g} ms" if unit == "s" else f"{value / 2**20:.3g} MiB"


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
