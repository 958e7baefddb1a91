"""What the results of all jobs share: a folder, and one table, printed, written as CSV and shown on a page."""

import csv
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from narrows._version import __version__
from narrows.files import replacing
from narrows.routing import Routing
from narrows.visualize import Cell, Report, save, text_table

if TYPE_CHECKING:
    import matplotlib.figure


class Result:
    """Base class: what a job found, as a table; `str()` is that table as text."""

    folder: Path

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table; for columns whose best value stands out, whether that is the "max" or the "min"."""
        raise NotImplementedError

    def rows(self) -> list[list[object]]:
        """The rows of the table, under `columns`."""
        raise NotImplementedError

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.folder / "report.html"

    def add_table(self, report: Report, caption: str) -> None:
        """Show the table in a report."""
        best = {name: which for name, which in self.columns.items() if which is not None}
        report.table(list(self.columns), self.rows(), caption, best=best)

    def write_csv(self, path: Path) -> None:
        """The table as CSV, numbers as they are rather than as they are read."""
        with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(self.columns)
            table.writerows([getattr(cell, "value", cell) for cell in row] for row in self.rows())

    def __str__(self) -> str:
        return text_table(list(self.columns), self.rows())


def add_picture(report: Report, figure: "matplotlib.figure.Figure", path: Path, caption: str) -> None:
    """Show a figure in the report, and keep it as a file."""
    save(figure, path)
    report.figure(figure, caption)


def percent(share: float, plus_minus: str = "") -> Cell:
    """A share, read as a percentage."""
    return Cell(share, f"{100 * share:.1f}{plus_minus} %")


def mebibytes(count: int) -> Cell:
    """Bytes, read in MiB."""
    return Cell(count, f"{count / 2**20:.1f} MiB")


def per_second(rate: float) -> Cell:
    """A throughput, read as a whole number."""
    return Cell(rate, f"{rate:,.0f}")


def carriers_in_use(routing: Routing) -> Int[Tensor, "B"]:
    """How many carriers of each sample read any of its own tokens, those after the prefix."""
    return (routing.weights[..., routing.prefix :].amax((1, 3)) > 0).sum(1)


def machine() -> str:
    """What a speed was measured on, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}, narrows {__version__}"
