"""`narrows compare`: a baseline and every mechanism under one budget, and what each costs and keeps."""

import csv
import inspect
import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from narrows.data import ImageData, ImageDataModule, RememberedImages, picture
from narrows.errors import Diverged, InvalidArgument, NarrowsError, Terminated
from narrows.files import locked, new_folder, replacing, write_text
from narrows.hub.models import accelerator_of
from narrows.jobs.report import (
    Result,
    add_picture,
    carriers_in_use,
    machine,
    mebibytes,
    per_second,
    percent,
)
from narrows.measure import Cost, Timing, compare_speed, measure, peak_memory
from narrows.models import create_model, load_model
from narrows.routing import Routing
from narrows.training.classification import Classification
from narrows.training.run import LAST, Run, quiet_lightning, train
from narrows.validation import check_positive
from narrows.visualize import Cell, ParetoPoint, Report, gallery, overlay, pareto

MODELS = ("vit_mini", "ats_vit_mini", "soft_moe_vit_mini", "sepvit_mini", "slot_vit_mini", "resampler_vit_mini")
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
ENOUGH_STEPS = 600
"""Training steps of a small model, below which it says little which of them is better."""
SETTINGS_FILE = "settings.json"
RUNS_FILE = "runs.csv"


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


@dataclass(frozen=True)
class Comparison(Result):
    """Models trained under one budget, and what each costs and keeps.

    Args:
        runs: what was trained, in that order; after an interruption, what was finished.
        costs: by registry name.
        folder: where models, tables and the report are.
        interrupted: number of the signal that cut it short, 2 for Ctrl-C; 0 if none did.
        held_out: number of images that accuracies are measured on.
        unfinished: how many runs are still to come.
        diverged: runs whose loss or weights became no numbers: model and seed.
    """

    runs: Sequence[Run]
    costs: dict[str, ModelCost]
    folder: Path
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
        doubtful = [name for name, found in times.items() if not _one_is_fastest(found)]
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
        mean, z, n = fmean(self.accuracies(model)), NormalDist().inv_cdf(0.975), self.held_out
        images = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) if n else 0.0
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
        """Which model is the most accurate, if that is more than chance, in a sentence."""
        if len(self.costs) < 2:
            return ""
        if self.best is not None:
            return f"{self.best} is the most accurate, by more than the 95 % interval."
        tied = self.tied()
        seeds = " and these seeds" if len(self.runs) > len(self.costs) else ""
        return (
            f"No model is the most accurate: {self.held_out} held-out images{seeds} cannot tell "
            f"{', '.join(tied[:-1])} and {tied[-1]} apart (95 % interval)."
        )

    def rows(self) -> list[list[object]]:
        """A row for each model, under `columns`."""
        return [self._row(model, found) for model, found in self.costs.items()]

    def points(self) -> list[ParetoPoint]:
        """Accuracy in percent against millions of MACs."""
        return [
            ParetoPoint(model, found.cost.macs / 1e6, 100 * fmean(self.accuracies(model)), 100 * self.margin(model))
            for model, found in self.costs.items()
        ]

    def _row(self, model: str, found: ModelCost) -> list[object]:
        cost = found.cost
        return [
            model,
            percent(fmean(self.accuracies(model)), f" ± {100 * self.margin(model):.1f}"),
            Cell(cost.macs, f"{cost.macs / 1e6:.2f} M"),
            Cell(found.carried, f"{found.tokens} → {found.carried:.3g}"),
            per_second(cost.batch / found.training.median),
            per_second(cost.throughput.median),
            mebibytes(found.memory),
            Cell(cost.parameters, f"{cost.parameters:,}"),
        ]


def _one_is_fastest(times: Sequence[Timing]) -> bool:
    """Whether the spread of the fastest and that of the next do not overlap."""
    first, *others = sorted(times, key=lambda time: time.median)
    return not others or first.p80 < others[0].p20


def compare(
    data: str = "digits",
    *,
    models: Sequence[str] = MODELS,
    seeds: int = 1,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    learning_rate: float = 2e-3,
    output: str | Path = "runs",
    device: str = "auto",
    resume: str | Path | None = None,
    report_only: bool = False,
) -> Comparison:
    """Train models side by side on one image data set; report accuracy, cost and where tokens went.

    Every model sees the same images, in the same order, for as many epochs. Models, tables, logs and `report.html` are
    written to `<output>/<time>/`; Ctrl-C and SIGTERM report on the models that are finished.

    Args:
        data: "digits" (scenes with handwritten digits, no download), "small_digits" (the digit a quarter as wide as the
            scene), or a folder with one folder of images per class.
        models: registry names, in a shell separated by commas; `narrows info` lists them.
        seeds: how many seeds each model is trained from; two or more give a spread.
        epochs: passes over the training images; by default 10, or as many as make 600 steps of a small folder.
        batch_size: images in a training step; by default 64, less for a small folder: a sixteenth of its images.
        image_size: side of the images in pixels; by default 32 for digits, 64 for small digits and folders.
        learning_rate: the peak learning rate.
        output: folder of all comparisons.
        device: "auto", "cpu" or "cuda".
        resume: folder of a comparison that was stopped: what is finished is kept, the model at hand goes on where it
            was, and the settings are those it was begun with.
        report_only: with `resume`, train nothing and report on what is finished, while another process trains, say.

    Raises:
        InvalidArgument: an unknown model or device, no model, a number that is not positive; other settings than those
            of the comparison that goes on.
        DataError: images that cannot be used.
        CannotWrite: the output folder or the disk refuses.
    """
    check_positive(seeds=seeds, **{n: v for n, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None})
    if not models:
        raise InvalidArgument("models", expected="at least one registry name", got="none")
    if report_only and resume is None:
        raise InvalidArgument("resume", expected="the folder of a comparison to report on", got=None)
    accelerator = accelerator_of(device)
    asked = {
        "data": data, "models": list(models), "seeds": seeds, "epochs": epochs, "batch_size": batch_size,
        "image_size": image_size, "learning_rate": learning_rate,
    }  # fmt: skip
    if resume is None:
        found = ImageDataModule(data, image_size=image_size).loaded
        settings = _settings(asked, found)
    else:
        settings = _read_settings(Path(resume), asked)
        found = ImageDataModule(settings.data, image_size=settings.image_size).loaded
        if (len(found.train), len(found.held_out)) != (settings.num_train, settings.num_held_out) or list(
            found.classes
        ) != list(settings.classes):
            raise InvalidArgument("data", expected=f"the images {resume} was begun with", got=f"others, {found.name}")
    # Built before anything is trained, so that a wrong name or size shows at once.
    for name in settings.models:
        create_model(name, **_shape(found))
    folder = new_folder(output) if resume is None else Path(resume)
    if resume is None:
        write_text(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2) + "\n")
    tqdm.write(_announcement(found, settings, folder))
    try:
        with quiet_lightning():
            interrupted = 0 if report_only else _train(settings, found, folder, accelerator)
        runs, diverged = _read_runs(folder)
        if interrupted and not runs:
            raise Terminated(interrupted)
        if not runs:
            state = "every model diverged" if diverged else "no model is finished yet"
            raise NarrowsError(f"There is nothing to report on in {folder}: {state}.")
        comparison = Comparison(
            runs=runs,
            costs=_costs(runs, found, settings.batch_size, accelerator),
            folder=folder,
            interrupted=interrupted,
            held_out=len(found.held_out),
            unfinished=settings.seeds * len(settings.models) - len(runs) - len(diverged),
            diverged=diverged,
        )
        comparison.write_csv(folder / "comparison.csv")
        _write_report(comparison, found, settings)
    except KeyboardInterrupt as stop:
        nothing = "" if _read_runs(folder)[0] else "No model was finished yet. "
        raise Terminated(getattr(stop, "signum", signal.SIGINT), f"{nothing}{go_on(folder)}") from None
    return comparison


def go_on(folder: Path) -> str:
    """How a comparison that was stopped goes on, as the end of a message."""
    return f"Go on with: narrows compare --resume {folder}"


def _settings(asked: Mapping[str, Any], data: ImageData) -> Settings:
    """What was asked for; where nothing was, batches small enough for the images, and epochs that make enough steps."""
    count = len(data.train)
    batch_size = asked["batch_size"] or min(64, max(1, count), max(4, 2 ** int(math.log2(max(1, count // 16)))))
    epochs = asked["epochs"] or max(10, math.ceil(ENOUGH_STEPS / max(1, count // batch_size)))
    chosen = {"epochs": epochs, "batch_size": batch_size, "image_size": data.image_size}
    found = {"num_train": count, "num_held_out": len(data.held_out), "classes": list(data.classes)}
    return Settings(**{**asked, **chosen, **found})


def _read_settings(folder: Path, asked: Mapping[str, Any]) -> Settings:
    """Those a comparison was begun with; others are refused."""
    file = folder / SETTINGS_FILE
    try:
        settings = Settings(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        expected, got = f"the folder of a comparison, with {SETTINGS_FILE}", repr(str(folder))
        raise InvalidArgument("resume", expected=expected, got=got) from error
    parameters = inspect.signature(compare).parameters
    defaults = {**{name: parameters[name].default for name in asked}, "models": list(MODELS)}
    for name, value in asked.items():
        if value not in (was := getattr(settings, name), defaults[name]):
            expected = f"{was!r}, with which {folder} was begun"
            raise InvalidArgument(name, expected=expected, got=repr(value), hint="Leave it out.")
    return settings


def _train(settings: Settings, data: ImageData, folder: Path, accelerator: str) -> int:
    """Train what is not finished yet, and note each in the folder; the signal that cut it short, or 0."""
    loaded = {0: replace(data, train=RememberedImages(data.train))}
    with locked(folder / "compare", tell=f"Waiting for another process that works in {folder}"):
        runs, diverged = _read_runs(folder)
        done = {(run.model, run.seed) for run in runs} | set(diverged)
        for number, (seed, name) in enumerate(product(range(settings.seeds), settings.models), start=1):
            if (name, seed) in done:
                continue
            label = f"{number}/{settings.seeds * len(settings.models)} {name}"
            label += f" seed {seed}" if settings.seeds > 1 else ""
            images = ImageDataModule(
                settings.data, image_size=settings.image_size, batch_size=settings.batch_size, seed=seed
            )
            if seed not in loaded:  # all models of a seed see the same images, each drawn or read once
                loaded = {seed: replace(images.loaded, train=RememberedImages(images.loaded.train))}
            images.loaded = loaded[seed]
            torch.manual_seed(seed)
            model = create_model(name, **_shape(data))
            task = Classification(model, num_classes=data.num_classes, learning_rate=settings.learning_rate)
            try:
                runs.append(
                    train(task, name, images, folder, label=label, epochs=settings.epochs, accelerator=accelerator)
                )
            except Diverged as error:
                tqdm.write(f"{name}, seed {seed}: {error}")
                diverged.append((name, seed))
            except KeyboardInterrupt as stop:
                return getattr(stop, "signum", signal.SIGINT)
            _write_runs(runs, diverged, folder)
            (folder / "logs" / f"{name}-seed{seed}" / LAST).unlink(missing_ok=True)
    return 0


def _costs(runs: Sequence[Run], data: ImageData, batch_size: int, accelerator: str) -> dict[str, ModelCost]:
    """What each model costs; speeds are measured in turns, so that a busy machine slows all of them."""
    device = torch.device(accelerator)
    models = {run.model: load_model(run.folder).to(device) for run in reversed(runs)}
    models = {name: models[name] for name in dict.fromkeys(run.model for run in runs)}
    images, labels = data.held_out.batch(range(min(batch_size, len(data.held_out))))
    images, labels = images.to(device), labels.to(device)
    steps = {name: partial(_training_step, model, images, labels) for name, model in models.items()}
    training = compare_speed(steps, repeats=5, device=device)
    costs = {}
    for name, model in tqdm(models.items(), desc="measuring", unit="model"):
        narrow = narrowest(model.eval().routing(images))
        tokens = math.prod(model.token_grid(images))
        costs[name] = ModelCost(
            cost=measure(model, images),
            carried=float(tokens) if narrow is None else carriers_in_use(narrow).float().mean().item(),
            tokens=tokens,
            training=training[name],
            memory=peak_memory(steps[name], device),
        )
    return costs


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.train()
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def _shape(data: ImageData) -> dict[str, Any]:
    return {"num_classes": data.num_classes, "image_size": data.image_size, "channels": data.channels}


def _announcement(data: ImageData, settings: Settings, folder: Path) -> str:
    few = f"\n{_few_steps(settings)}" if _few_steps(settings) else ""
    seeds = settings.seeds
    return (
        f"{data.name}: {len(data.train):,} training and {len(data.held_out):,} held-out images of "
        f"{data.image_size} pixels in {data.num_classes} classes (held out: {data.held_out_rule})\n"
        f"{len(settings.models)} models, {seeds} seed{'s' if seeds > 1 else ''}, {settings.epochs} epochs each, "
        f"in batches of {settings.batch_size}; results in {folder}{few}"
    )


def _few_steps(settings: Settings) -> str:
    """A warning, where models have hardly begun to learn and their order says little."""
    if settings.steps >= ENOUGH_STEPS:
        return ""
    return (
        f"Warning: {settings.steps} training steps are few: which model is better shows after {ENOUGH_STEPS} or so. "
        "Give more --epochs or a smaller --batch_size."
    )


def _write_runs(runs: Sequence[Run], diverged: Sequence[tuple[str, int]], folder: Path) -> None:
    """Every run as a row of a CSV file; one that diverged has no accuracy."""
    rows: list[dict[str, Any]] = [{**asdict(run), "folder": run.folder.name} for run in runs]
    rows += [{"model": model, "seed": seed} for model, seed in diverged]
    with replacing(folder / RUNS_FILE) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Run)])
        table.writeheader()
        table.writerows(rows)


def _read_runs(folder: Path) -> tuple[list[Run], list[tuple[str, int]]]:
    """The runs that are finished, and those that diverged, as `_write_runs` wrote them."""
    if not (folder / RUNS_FILE).exists():
        return [], []
    with (folder / RUNS_FILE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = [
        Run(
            model=row["model"],
            seed=int(row["seed"]),
            accuracy=float(row["accuracy"]),
            images=int(row["images"]),
            seconds=float(row["seconds"]),
            folder=folder / "models" / row["folder"],
        )
        for row in rows
        if row["accuracy"]
    ]
    return runs, [(row["model"], int(row["seed"])) for row in rows if not row["accuracy"]]


def narrowest(routings: Sequence[Routing]) -> Routing | None:
    """Where an image's own tokens pass through fewest carriers, the last one of equals; None without any routing.

    The own tokens are those on the finest grid: later stages of a pyramid route what earlier ones have merged.
    """
    finest = max((routing.weights.shape[-1] for routing in routings), default=0)
    own = [routing for routing in reversed(routings) if routing.weights.shape[-1] == finest]
    return min(own, key=lambda routing: carriers_in_use(routing).float().mean().item(), default=None)


def _write_report(comparison: Comparison, data: ImageData, settings: Settings) -> None:
    """Write `report.html` and the pictures of a comparison into its folder."""
    seeds = 1 + max(run.seed for run in comparison.runs)
    report = Report(
        "What token bottlenecks cost and keep",
        f"{data.name}: {len(comparison.costs)} models trained on {len(data.train):,} images "
        f"for {settings.epochs} epochs" + (f", from {seeds} seeds each" if seeds > 1 else ""),
    )
    if comparison.unfinished:
        state = "Interrupted: this" if comparison.interrupted else "This"
        report.paragraph(
            f"{state} page shows the models that were finished; {comparison.unfinished} of the runs are to come. "
            f"{go_on(comparison.folder)}"
        )
    if few := _few_steps(settings):
        report.paragraph(few)
    for model, seed in comparison.diverged:
        report.paragraph(f"{model} from seed {seed} diverged: its loss became no number. It is in no table.")
    report.paragraph(
        f"Every model saw the same images in the same order, in batches of {settings.batch_size}. Accuracy is the "
        f"share of the {len(data.held_out):,} held-out images it gets right (held out: {data.held_out_rule}), with the "
        "95 % interval that the number of these images and the seeds leave; one seed does not say how much seeds "
        "differ. MACs are "
        "multiply-accumulates of one image with the tokens really kept. Tokens: what an image's tokens are at "
        "first, and how many carriers they pass through at the narrowest place. Speeds were taken in turns on one "
        f"machine ({machine()})."
    )
    if data.skipped:
        names = ", ".join(str(path) for path in data.skipped[:5])
        report.paragraph(f"{len(data.skipped)} images could not be read and were skipped: {names}.")
    comparison.add_table(report, "What each model costs and keeps.")
    if comparison.verdict:
        report.paragraph(comparison.verdict)
    report.section("Accuracy against cost")
    figure = pareto(comparison.points(), x="million MACs per image", y="held-out accuracy (%)")
    caption = "A model is on the line if it is more accurate than every cheaper one by more than the 95 % interval."
    add_picture(report, figure, comparison.folder / "pictures" / "pareto.png", caption)
    _where_tokens_went(report, comparison, data)
    report.section("Use a model")
    report.paragraph(
        f'narrows.load_model("{comparison.runs[0].folder}") opens a trained model; narrows show draws where the tokens '
        "of your own images go in it."
    )
    report.write(comparison.report)


def _where_tokens_went(report: Report, comparison: Comparison, data: ImageData) -> None:
    images, captions = _test_images(data)
    pictures = picture(images)
    models = {run.model: load_model(run.folder) for run in reversed(comparison.runs)}
    routings = {name: models[name].routing(images) for name in comparison.costs}
    columns = {name: found for name, every in routings.items() if (found := narrowest(every)) is not None}
    if not columns:
        return
    folder = comparison.folder / "pictures"
    report.section("Where tokens went")
    figure = gallery(pictures, columns, captions=captions)
    caption = f"The first held-out image of {len(captions)} classes, and where its tokens went."
    add_picture(report, figure, folder / "gallery.png", caption)
    for name in columns:
        report.section(name)
        # The first paragraph of the model's docstring: what its bottleneck does.
        paragraph = (type(models[name]).__doc__ or "").split("\n\n")[0]
        report.paragraph(" ".join(paragraph.split()).replace("`", ""))
        for routing in routings[name]:
            path = folder / f"{name}-{routing.name}.png"
            add_picture(report, overlay(pictures[0], routing), path, f"In {routing.name}")


def _test_images(data: ImageData) -> tuple[Tensor, list[str]]:
    """The first held-out image of each of the first classes, and what they are called."""
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
    return images, [data.classes[label] for label in labels]
