"""What a comparison found: one `Run` for each trained model, put together as a table."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from narrows.measure import Cost, Timing
from narrows.training.run import Run
from narrows.visualize import Cell, ParetoPoint, text_table

COLUMNS = (
    "model",
    "accuracy",
    "MACs/image",
    "tokens",
    "train images/s",
    "infer images/s",
    "train memory",
    "parameters",
)
BEST = {
    "accuracy": "max",
    "MACs/image": "min",
    "train images/s": "max",
    "infer images/s": "max",
    "train memory": "min",
}


@dataclass(frozen=True)
class Expense:
    """What a model costs.

    Args:
        cost: parameters, MACs and speed of inference.
        carried: carriers that the tokens of an image pass through at the narrowest place, on average.
        tokens: tokens an image becomes.
        training: seconds for a training step on a batch of `cost.batch` images.
        memory: greatest number of bytes that step has alive beyond the weights.
    """

    cost: Cost
    carried: float
    tokens: int
    training: Timing
    memory: int


@dataclass(frozen=True)
class Comparison:
    """Models trained under one budget, and what each costs and keeps.

    Args:
        runs: what was trained, in that order; after an interruption, what was finished.
        expenses: by registry name.
        folder: where models, tables and the report are.
        interrupted: whether Ctrl-C cut it short.
    """

    runs: Sequence[Run]
    expenses: dict[str, Expense]
    folder: Path
    interrupted: bool = False

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.folder / "report.html"

    def accuracies(self, model: str) -> list[float]:
        """Held-out accuracy of every seed."""
        return [run.accuracy for run in self.runs if run.model == model]

    def rows(self) -> list[list[object]]:
        """A row for each model, under `COLUMNS`."""
        return [self._row(model, expense) for model, expense in self.expenses.items()]

    def points(self) -> list[ParetoPoint]:
        """Accuracy in percent against millions of MACs."""
        return [
            ParetoPoint(
                model, expense.cost.macs / 1e6, 100 * fmean(seen := self.accuracies(model)), 100 * _spread(seen)
            )
            for model, expense in self.expenses.items()
        ]

    def __str__(self) -> str:
        return text_table(COLUMNS, self.rows())

    def _row(self, model: str, expense: Expense) -> list[object]:
        accuracies, cost = self.accuracies(model), expense.cost
        spread = f" ± {100 * _spread(accuracies):.1f}" if len(accuracies) > 1 else ""
        training = cost.batch / expense.training.median
        return [
            model,
            Cell(fmean(accuracies), f"{100 * fmean(accuracies):.1f}{spread} %"),
            Cell(cost.macs, f"{cost.macs / 1e6:.2f} M"),
            Cell(expense.carried, f"{expense.tokens} → {expense.carried:.3g}"),
            Cell(training, f"{training:,.0f}"),
            Cell(cost.throughput.median, f"{cost.throughput.median:,.0f}"),
            Cell(expense.memory, f"{expense.memory / 2**20:.1f} MiB"),
            Cell(cost.parameters, f"{cost.parameters:,}"),
        ]


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Every run as a row of a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Run)])
        table.writeheader()
        table.writerows(asdict(run) for run in runs)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
