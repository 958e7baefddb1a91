"""What `narrows compare` finds: what each model costs and keeps, how sure that is, and the report of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from scipy.special import stdtrit
from torch import Tensor

from narrows.costs import Cost, Spread, Timing
from narrows.data import ImageData, picture
from narrows.hub.models import LoadedModel, open_model
from narrows.jobs.report import (
    SPREAD,
    Result,
    add_picture,
    carriers_in_use,
    command_of,
    counted,
    fastest,
    listed,
    margin_of_share,
    mebibytes,
    per_second,
    percent,
)
from narrows.models import ImageClassifier, list_models
from narrows.routing import Routing
from narrows.training.run import Run
from narrows.visualize import Cell, ParetoPoint, Report, describe, gallery, overlay, pareto

COLUMNS = {
    "model": None,
    "accuracy": "max",
    "MACs/image": "min",
    "tokens": None,
    "train images/s": "max",
    "infer images/s": "max",
    "train memory": "min",
    "parameters": None,
}
NUM_PICTURES = 6
PRETRAINED_RATE = 0.1
"""By how much the learning rate of a model that begins with weights is lower: at the full one it would lose them."""
ENOUGH_STEPS = 600
"""Training steps of a small model, below which it says little which of them is better."""


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Args:
        cost: parameters, MACs and speed of inference.
        carried: carriers that the tokens of an image pass through where they are fewest, on average.
        tokens: tokens an image becomes.
        training: seconds for a training step on a batch of `cost.batch` images.
        memory: greatest number of bytes that step has alive beyond the weights.
    """

    cost: Cost
    carried: float
    tokens: int
    training: Timing
    memory: int

    @property
    def training_throughput(self) -> Spread:
        """Images per second of training steps."""
        return Spread(tuple(self.cost.batch / seconds for seconds in self.training.samples))


@dataclass(frozen=True)
class Settings:
    """What a comparison was begun with, as it is kept in its folder; the arguments are those of `compare`.

    Args:
        num_train: number of training images.
        num_held_out: number of held-out images.
        classes: their names.
    """

    data: str
    models: Sequence[str]
    seeds: int
    epochs: int
    batch_size: int
    image_size: int
    learning_rate: float
    num_train: int
    num_held_out: int
    classes: Sequence[str]

    @property
    def steps(self) -> int:
        """Training steps of each model."""
        return self.epochs * (self.num_train // self.batch_size)

    def command(self, models: Sequence[str]) -> str:
        """The command that compares these models as here."""
        found = ("num_train", "num_held_out", "classes")
        asked = {name: value for name, value in asdict(self).items() if name not in found}
        return command_of("compare", **{**asked, "models": models})


@dataclass(frozen=True)
class Comparison(Result):
    """Models trained under one budget, and what each costs and keeps.

    Args:
        runs: what was trained, in that order; after an interruption, what was finished.
        costs: by registry name.
        folder: where models, tables and the report are.
        settings: what it was begun with.
        interrupted: number of the signal that cut it short, 2 for Ctrl-C; 0 if none did.
        held_out: number of images that accuracies are measured on.
        unfinished: how many runs are still to come.
        diverged: runs whose loss or weights became no numbers: model and seed.
    """

    runs: Sequence[Run]
    costs: dict[str, ModelCost]
    folder: Path
    settings: Settings
    interrupted: int = 0
    held_out: int = 0
    unfinished: int = 0
    diverged: Sequence[tuple[str, int]] = ()

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table; the best accuracy and the best speeds stand out only where they are more than chance."""
        times = {
            "train images/s": [found.training for found in self.costs.values()],
            "infer images/s": [found.cost.latency for found in self.costs.values()],
        }
        doubtful = [name for name, found in times.items() if not fastest(found)]
        if self.best is None:
            doubtful.append("accuracy")
        return {name: None if name in doubtful else which for name, which in COLUMNS.items()}

    def accuracies(self, model: str) -> list[float]:
        """Held-out accuracy of every seed."""
        return [run.accuracy for run in self.runs if run.model == model]

    def margin(self, model: str) -> float:
        """Half of the 95 % interval of the mean accuracy: by chance other images or other seeds give so much else.

        Of the images it is Wilson's interval (1927), of the seeds Student's with the variance within all models.
        """
        images = margin_of_share(fmean(self.accuracies(model)), self.held_out)
        by_model = [self.accuracies(name) for name in self.costs]
        freedom = sum(len(seen) - 1 for seen in by_model)
        if freedom == 0:
            return images
        variance = sum((accuracy - fmean(seen)) ** 2 for seen in by_model for accuracy in seen) / freedom
        seeds = float(stdtrit(freedom, 0.975)) * math.sqrt(variance / len(self.accuracies(model)))
        return math.hypot(images, seeds)

    def tied(self) -> list[str]:
        """The most accurate model, and those that the data cannot tell from it."""
        means = {model: fmean(self.accuracies(model)) for model in self.costs}
        best = max(means, key=means.__getitem__)
        return [best] + [
            model
            for model in means
            if model != best and means[best] - means[model] <= math.hypot(self.margin(best), self.margin(model))
        ]

    @property
    def best(self) -> str | None:
        """The model that is more accurate than all others beyond the 95 % interval; None where there is none."""
        tied = self.tied()
        return tied[0] if len(tied) == 1 and len(self.costs) > 1 else None

    @property
    def verdict(self) -> str:
        """Which model is the most accurate, if that is more than chance, in a sentence or two."""
        tied, seen = self.tied(), f"{self.held_out:,} held-out images"
        if self.best is not None:
            means = {model: fmean(self.accuracies(model)) for model in self.costs}
            (next_best,) = sorted(means, key=means.__getitem__)[-2:-1]
            ahead, by_chance = (
                means[self.best] - means[next_best],
                math.hypot(*map(self.margin, (self.best, next_best))),
            )
            return (
                f"{self.best} is the most accurate, beyond the 95 % interval: {self._accuracy(self.best)} on {seen}, "
                f"{100 * ahead:.1f} ± {100 * by_chance:.1f} points before {next_best}."
            )
        if len(self.costs) < 2:
            return f"{tied[0]} gets {self._accuracy(tied[0])} of {seen} right (95 % interval)."
        seeds = f" and {len(self.runs)} runs" if len(self.runs) > len(self.costs) else ""
        cheapest = min(tied, key=lambda model: self.costs[model].cost.macs)
        return (
            f"No difference in accuracy can be told between {listed(tied)} on {seen}{seeds} (95 % interval; "
            f"{tied[0]} gets {self._accuracy(tied[0])}). Of these {cheapest} needs the fewest MACs."
        )

    @property
    def codes(self) -> Sequence[str]:
        """For each model the command that trains and measures it again."""
        return [self.settings.command([model]) for model in self.costs]

    @property
    def command(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The command that does the whole comparison again."""
        return self.settings.command(self.settings.models)

    def _accuracy(self, model: str) -> str:
        return percent(fmean(self.accuracies(model)), f" ± {100 * self.margin(model):.1f}").text

    def rows(self) -> list[list[object]]:
        """A row for each model, under `columns`."""
        return [self._row(model, found) for model, found in self.costs.items()]

    def points(self) -> list[ParetoPoint]:
        """Accuracy in percent against MACs of an image."""
        return [
            ParetoPoint(
                model,
                found.cost.macs,
                100 * fmean(self.accuracies(model)),
                100 * self.margin(model),
                f"{per_second(found.cost.throughput).text} images/s",
            )
            for model, found in self.costs.items()
        ]

    def _row(self, model: str, found: ModelCost) -> list[object]:
        cost = found.cost
        return [
            model,
            percent(fmean(self.accuracies(model)), f" ± {100 * self.margin(model):.1f}"),
            Cell(cost.macs, f"{cost.macs / 1e6:.2f} M"),
            Cell(found.carried, f"{found.tokens} → {found.carried:.3g}"),
            per_second(found.training_throughput),
            per_second(cost.throughput),
            mebibytes(found.memory),
            Cell(cost.parameters, f"{cost.parameters:,}"),
        ]


def go_on(folder: Path) -> str:
    """How a comparison that was stopped goes on, as the end of a message."""
    return f"Go on with: narrows compare --resume {folder}"


def few_steps(settings: Settings) -> str:
    """A warning, where models have hardly begun to learn and their order says little."""
    if settings.steps >= ENOUGH_STEPS:
        return ""
    return (
        f"Warning: {settings.steps} training steps are few: which model is better shows after {ENOUGH_STEPS} or so. "
        "Give more --epochs or a smaller --batch_size."
    )


def is_pretrained(model: str) -> bool:
    """Whether a model begins with weights, and not with random ones."""
    return model not in list_models()


def open_runs(runs: Sequence[Run]) -> dict[str, LoadedModel]:
    """The models that were trained, each from its first seed, by name."""
    first = {run.model: run for run in reversed(runs)}
    of_timm = "timm:local-dir:{}".format
    return {
        name: open_model(of_timm(first[name].folder) if name.startswith("timm:") else first[name].folder)
        for name in dict.fromkeys(run.model for run in runs)
    }


def narrowest(routings: Sequence[Routing]) -> Routing | None:
    """Where an image's own tokens pass through fewest carriers, the last one of equals; None without any routing.

    The own tokens are those on the finest grid: later stages of a pyramid route what earlier ones have merged.
    """
    finest = max((routing.weights.shape[-1] for routing in routings), default=0)
    own = [routing for routing in reversed(routings) if routing.weights.shape[-1] == finest]
    return min(own, key=lambda routing: carriers_in_use(routing).float().mean().item(), default=None)


def write_report(comparison: Comparison, data: ImageData, device: torch.device) -> None:
    """Write `report.html` and the pictures of a comparison, measured on `device`, into its folder."""
    settings = comparison.settings
    seeds = 1 + max(run.seed for run in comparison.runs)
    report = comparison.begin_report(
        "What token bottlenecks cost and keep",
        f"{data.name}: {counted(len(comparison.costs), 'model')} trained on {len(data.train):,} images "
        f"for {counted(settings.epochs, 'epoch')}" + (f", from {seeds} seeds each" if seeds > 1 else ""),
        device,
    )
    if comparison.unfinished:
        state = "Interrupted: this" if comparison.interrupted else "This"
        report.paragraph(
            f"{state} page shows the models that were finished; {comparison.unfinished} of the runs are to come. "
            f"{go_on(comparison.folder)}"
        )
    if few := few_steps(settings):
        report.paragraph(few)
    for model, seed in comparison.diverged:
        report.paragraph(f"{model} from seed {seed} diverged: its loss became no number. It is in no table.")
    if pretrained := [name for name in comparison.costs if is_pretrained(name)]:
        report.paragraph(
            f"{', '.join(pretrained)} began with weights from an earlier training and learned at {PRETRAINED_RATE:g} "
            "of the learning rate; the others began with random weights: the mechanism is not all that sets them apart."
        )
    if data.skipped:
        names = ", ".join(str(path) for path in data.skipped[:5])
        report.paragraph(f"{len(data.skipped)} images could not be read and were skipped: {names}.")
    comparison.add_table(report, "What each model costs and keeps.")
    report.paragraph(
        f"Every model saw the same images in the same order, in batches of {settings.batch_size}. Accuracy is the "
        f"share of the {len(data.held_out):,} held-out images it gets right (held out: {data.held_out_rule}), with the "
        "95 % interval that the number of these images and the seeds leave; one seed does not say how much seeds "
        "differ. MACs are multiply-accumulates of one image with the tokens really kept. Tokens: what an image's "
        "tokens are at first, and how many carriers they pass through at the narrowest place. Speeds were taken in "
        f"turns. {SPREAD}"
    )
    report.section("Accuracy against cost")
    points = comparison.points()
    figure = pareto(points, x="MACs per image", y="held-out accuracy (%)", bounds=(0.0, 100.0))
    caption = "A model is on the line if it is more accurate than every cheaper one by more than the 95 % interval."
    alt = "Accuracy against MACs per image. " + "; ".join(
        f"{point.name}: {point.quality:.1f} ± {point.spread:.1f} % at {point.cost / 1e6:.2f} M" for point in points
    )
    add_picture(report, figure, comparison.folder / "pictures" / "pareto.png", caption, alt=f"{alt}.")
    _where_tokens_went(report, comparison, data)
    report.section("Use a model")
    report.code(f"import narrows\n\nmodel = narrows.load_model({str(comparison.runs[0].folder)!r})")
    report.paragraph("opens a trained model; narrows show draws where the tokens of your own images go in it.")
    report.write(comparison.report)


@torch.no_grad()
def _where_tokens_went(report: Report, comparison: Comparison, data: ImageData) -> None:
    images, labels = _test_images(data)
    captions = [data.classes[label] for label in labels]
    pictures = picture(images)
    models = {name: found.module for name, found in open_runs(comparison.runs).items()}
    routings = {name: model.routing(images) for name, model in models.items() if isinstance(model, ImageClassifier)}
    columns = {name: found for name, every in routings.items() if (found := narrowest(every)) is not None}
    if not columns:
        return
    folder = comparison.folder / "pictures"
    report.section("Where tokens went")
    given = {
        name: [
            f"{data.classes[answer]} {'✓' if answer == label else '✗'}"
            for answer, label in zip(models[name](images).argmax(-1).tolist(), labels, strict=True)
        ]
        for name in columns
    }
    figure = gallery(pictures, columns, captions=captions, below=given)
    caption = (
        f"The first held-out image of {len(captions)} classes, where its tokens went, and below each picture the class "
        "that the model gives it."
    )
    alt = f"A row of pictures for each image. Of the first, a {captions[0]}: " + " ".join(
        f"{name}: {describe(routing)} It is taken for {given[name][0]}." for name, routing in columns.items()
    )
    add_picture(report, figure, folder / "gallery.png", caption, alt=alt)
    for name in columns:
        report.section(name)
        # The first paragraph of the model's docstring: what its bottleneck does.
        paragraph = (type(models[name]).__doc__ or "").split("\n\n")[0]
        report.paragraph(" ".join(paragraph.split()).replace("`", ""))
        for routing in routings[name]:
            path = folder / f"{name}-{routing.name}.png"
            figure = overlay(pictures[0], routing)
            add_picture(report, figure, path, f"In {routing.name}", alt=f"A {captions[0]}: {describe(routing)}")


def _test_images(data: ImageData) -> tuple[Tensor, list[int]]:
    """The first held-out image of each of the first classes, and their labels."""
    chosen: dict[int, int] = {}
    wanted = min(NUM_PICTURES, data.num_classes)
    for start in range(0, len(data.held_out), 64):
        labels = data.held_out.batch(range(start, min(start + 64, len(data.held_out))))[1].tolist()
        for index, label in enumerate(labels, start):
            chosen.setdefault(label, index)
        if len(chosen) >= wanted:
            break
    labels = sorted(chosen)[:wanted]
    images, _ = data.held_out.batch([chosen[label] for label in labels])
    return images, labels
