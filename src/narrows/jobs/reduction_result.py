"""What a model costs and keeps under several reductions, as one table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from narrows.jobs.trials import Trial
from narrows.measure.cost import scaled
from narrows.visualize import Cell, ParetoPoint, text_table

MAY_LOSE = 0.01


@dataclass(frozen=True)
class ReductionResult:
    """A model untouched and under several reductions.

    Args:
        model: its name.
        trials: the untouched model first.
        tokens: how many an image becomes, beside the prefix.
        num_images: how many it was judged by.
        labelled: whether there is an accuracy.
        classifies: whether the model gives classes, else features.
        folder: where report and pictures are.
    """

    model: str
    trials: Sequence[Trial]
    tokens: int
    num_images: int
    labelled: bool
    classifies: bool
    folder: Path

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.folder / "report.html"

    @property
    def untouched(self) -> Trial:
        """The model as it was."""
        return self.trials[0]

    @property
    def chosen(self) -> Trial:
        """The reduction of fewest MACs that loses at most one point of quality; if none does, the one of best quality.

        Quality is accuracy, or without labels agreement with the untouched model.
        """
        kept = [trial for trial in self.trials[1:] if self.loss(trial) <= MAY_LOSE]
        if kept:
            return min(kept, key=lambda trial: fmean(trial.macs))
        return min(self.trials[1:], key=self.loss)

    @property
    def why(self) -> str:
        """What sets the chosen one apart, as the end of a sentence that begins with its name."""
        kept = f"{100 * self.chosen.quality:.1f} %, untouched {100 * self.untouched.quality:.1f} %"
        if self.loss(self.chosen) <= MAY_LOSE:
            return f"needs fewest MACs of those that lose at most one point ({kept})"
        return f"loses least, though more than one point ({kept})"

    def loss(self, trial: Trial) -> float:
        """By how much its quality is below that of the untouched model."""
        return round(self.untouched.quality - trial.quality, 9)

    @property
    def quality(self) -> str:
        """What `Trial.quality` is, with its unit."""
        if self.labelled:
            return "accuracy (%)"
        return "same class as the untouched model (%)" if self.classifies else "cosine with the untouched features (%)"

    @property
    def columns(self) -> tuple[str, ...]:
        """Heads of the table."""
        accuracy = ("accuracy",) if self.labelled else ()
        return ("method", "budget", *accuracy, "agreement", "tokens", "MACs/image", "images/s", "speed", "memory")

    @property
    def best(self) -> dict[str, str]:
        """The columns whose best value stands out, and which it is."""
        greatest = (
            ("accuracy", "agreement", "images/s", "speed") if self.labelled else ("agreement", "images/s", "speed")
        )
        return {**dict.fromkeys(greatest, "max"), "MACs/image": "min"}

    def rows(self) -> list[list[object]]:
        """A row for each trial, under `columns`."""
        return [self._row(trial) for trial in self.trials]

    def point(self, trial: Trial) -> ParetoPoint:
        """Quality in percent against MACs of an image."""
        return ParetoPoint(trial.name, fmean(trial.macs), 100 * trial.quality)

    def __str__(self) -> str:
        return text_table(self.columns, self.rows())

    def _row(self, trial: Trial) -> list[object]:
        untouched = trial is self.untouched
        faster = trial.timing.times_faster_than(self.untouched.timing).median
        accuracy = [] if trial.judgement.accuracy is None else [_percent(trial.judgement.accuracy)]
        low, high = min(trial.macs), max(trial.macs)
        spread = "" if low == high else f" ({scaled(low)} to {scaled(high)})"
        return [
            trial.method,
            trial.budget or None,
            *accuracy,
            None if untouched else _percent(trial.judgement.agreement),
            Cell(trial.kept, f"{self.tokens}" if untouched else f"{self.tokens} → {trial.kept:.3g}"),
            Cell(fmean(trial.macs), scaled(fmean(trial.macs)) + spread),
            Cell(trial.throughput.median, f"{trial.throughput.median:,.0f}"),
            None if untouched else Cell(faster, f"{faster:.2f}×"),
            Cell(trial.memory, f"{trial.memory / 2**20:.1f} MiB"),
        ]


def write_config(trial: Trial, path: str | Path) -> None:
    """The reduction of a trial as JSON: `narrows.reduce_tokens(model, **json.load(file))` does the same again."""
    assert trial.reduction is not None, "the untouched model has nothing to write"
    entries = {"method": trial.method, "budget": list(trial.reduction.schedule)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(entries) + "\n", encoding="utf-8")


def _percent(share: float) -> Cell:
    return Cell(share, f"{100 * share:.1f} %")
