"""What the results of all jobs share: a folder, and one table, printed, written as CSV and shown on a page."""

import csv
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor

from narrows._version import __version__
from narrows.bench.rows import processor
from narrows.costs import Spread, Timing
from narrows.files import replacing
from narrows.routing import Routing
from narrows.visualize import Cell, Report, save, text_table

if TYPE_CHECKING:
    import matplotlib.figure


class Result:
    """Base class: what a job found, as a table; `str()` is that table as text."""

    folder: Path
    command: str
    """The command that does the same again."""

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table; for columns whose best value stands out, whether that is the "max" or the "min"."""
        raise NotImplementedError

    def rows(self) -> list[list[object]]:
        """The rows of the table, under `columns`."""
        raise NotImplementedError

    @property
    def codes(self) -> Sequence[str]:
        """For each row the code that makes it again; "" where there is none."""
        raise NotImplementedError

    @property
    def verdict(self) -> str:
        """What was found, and how sure it is, in a sentence or two."""
        raise NotImplementedError

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.folder / "report.html"

    def begin_report(self, title: str, subtitle: str, device: torch.device) -> Report:
        """A report with the verdict, and with date, command, machine and versions."""
        packages = ("timm", "transformers", "lightning", "torchvision")
        versions = {"narrows": __version__, "Python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
        facts = {
            "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "Command": self.command,
            "Machine": machine(device),
            "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
        return Report(title, subtitle, verdict=self.verdict, facts=facts)

    def add_table(self, report: Report, caption: str) -> None:
        """Show the table in a report."""
        best = {name: which for name, which in self.columns.items() if which is not None}
        report.table(list(self.columns), self.rows(), caption, best=best, codes=self.codes)

    def write_csv(self, path: Path) -> None:
        """The table as CSV, numbers as they are rather than as they are read."""
        with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(self.columns)
            table.writerows([getattr(cell, "value", cell) for cell in row] for row in self.rows())

    def __str__(self) -> str:
        return text_table(list(self.columns), self.rows())


SPREAD = "Behind a speed stands half the distance between the 20th and the 80th percentile of its samples."


def command_of(job: str, **options: Any) -> str:
    """The shell command of a job with these options; None is none, lists are separated by commas.

    >>> command_of("compare", data="my photos", models=["vit_mini", "ats_vit_mini"], epochs=None)
    "narrows compare --data 'my photos' --models vit_mini,ats_vit_mini"
    """
    words = ["narrows", job]
    for name, value in options.items():
        if isinstance(value, bool):
            words += [f"--{name}", "true"] if value else []
        elif value is not None:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


def add_picture(report: Report, figure: "matplotlib.figure.Figure", path: Path, caption: str, *, alt: str) -> None:
    """Show a figure in the report, and keep it as a file; `alt` says what is seen."""
    save(figure, path)
    report.figure(figure, caption, alt=alt)


def listed(names: Sequence[str]) -> str:
    """Names as a part of a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def counted(count: int, what: str) -> str:
    """A number of things: "1 epoch", "1,000 epochs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(share: float, plus_minus: str = "") -> Cell:
    """A share, read as a percentage."""
    return Cell(share, f"{100 * share:.1f}{plus_minus} %")


def margin_of_share(share: float, count: int) -> float:
    """Half of the 95 % interval of a share of `count` images: Wilson's (1927)."""
    z = NormalDist().inv_cdf(0.975)
    return z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) if count else 0.0


def mean_difference(differences: Float[Tensor, "N"]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval, of what two options differ by on the same images.

    Where images are right or wrong, hence differences -1, 0 or 1, the interval is that of Agresti and Min (2005): half
    an image more of each of the four kinds. It is not empty where no image differs. Other differences: Student's.
    """
    values, count = differences.double(), len(differences)
    mean = values.mean().item()
    if not bool((values == values.round()).all()):
        spread = values.std().item() / math.sqrt(count) if count > 1 else math.inf
        return mean, float(stdtrit(max(1, count - 1), 0.975)) * spread
    total = count + 2
    variance = (values.square().sum().item() + 1) / total - (values.sum().item() / total) ** 2
    return mean, NormalDist().inv_cdf(0.975) * math.sqrt(variance / total)


def mebibytes(count: int) -> Cell:
    """Bytes, read in MiB."""
    return Cell(count, f"{count / 2**20:.1f} MiB")


def per_second(rate: Spread) -> Cell:
    """A throughput, read as a whole number with its spread."""
    half = (rate.p80 - rate.p20) / 2
    return Cell(rate.median, f"{rate.median:,.0f} ± {half:,.0f}" if len(rate.samples) > 1 else f"{rate.median:,.0f}")


def fastest(times: Sequence[Timing]) -> bool:
    """Whether one is fastest: its spread and that of the next do not overlap."""
    first, *others = sorted(times, key=lambda time: time.median)
    return not others or first.p80 < others[0].p20


def carriers_in_use(routing: Routing) -> Int[Tensor, "B"]:
    """How many carriers of each sample read any of its own tokens, those after the prefix."""
    return (routing.weights[..., routing.prefix :].amax((1, 3)) > 0).sum(1)


def machine(device: torch.device) -> str:
    """What a speed was measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()}"
    return f"{processor()}, {counted(torch.get_num_threads(), 'thread')}, {platform.system()}"
