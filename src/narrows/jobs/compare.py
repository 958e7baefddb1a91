"""`narrows compare`: a baseline and every mechanism under one budget, and what each costs and keeps."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from narrows.data import ImageData, ImageDataModule, RememberedImages, picture
from narrows.errors import InvalidArgument
from narrows.files import new_folder, replacing
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
from narrows.training.run import Run, quiet_lightning, train
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
class Comparison(Result):
    """Models trained under one budget, and what each costs and keeps.

    Args:
        runs: what was trained, in that order; after an interruption, what was finished.
        costs: by registry name.
        folder: where models, tables and the report are.
        interrupted: whether Ctrl-C cut it short.
    """

    runs: Sequence[Run]
    costs: dict[str, ModelCost]
    folder: Path
    interrupted: bool = False

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table."""
        return COLUMNS

    def accuracies(self, model: str) -> list[float]:
        """Held-out accuracy of every seed."""
        return [run.accuracy for run in self.runs if run.model == model]

    def rows(self) -> list[list[object]]:
        """A row for each model, under `columns`."""
        return [self._row(model, found) for model, found in self.costs.items()]

    def points(self) -> list[ParetoPoint]:
        """Accuracy in percent against millions of MACs."""
        return [
            ParetoPoint(model, found.cost.macs / 1e6, 100 * fmean(seen := self.accuracies(model)), 100 * _spread(seen))
            for model, found in self.costs.items()
        ]

    def _row(self, model: str, found: ModelCost) -> list[object]:
        accuracies, cost = self.accuracies(model), found.cost
        return [
            model,
            percent(fmean(accuracies), f" ± {100 * _spread(accuracies):.1f}" if len(accuracies) > 1 else ""),
            Cell(cost.macs, f"{cost.macs / 1e6:.2f} M"),
            Cell(found.carried, f"{found.tokens} → {found.carried:.3g}"),
            per_second(cost.batch / found.training.median),
            per_second(cost.throughput.median),
            mebibytes(found.memory),
            Cell(cost.parameters, f"{cost.parameters:,}"),
        ]


def compare(
    data: str = "digits",
    *,
    models: Sequence[str] = MODELS,
    seeds: int = 1,
    epochs: int = 10,
    batch_size: int = 64,
    image_size: int | None = None,
    learning_rate: float = 2e-3,
    output: str | Path = "runs",
    device: str = "auto",
) -> Comparison:
    """Train models side by side on one image data set; report accuracy, cost and where tokens went.

    Every model sees the same images, in the same order, for as many epochs. Models, tables, logs and `report.html` are
    written to `<output>/<time>/`; Ctrl-C keeps the models that are finished.

    Args:
        data: "digits" (scenes with handwritten digits, no download), "small_digits" (the digit a quarter as wide as the
            scene), or a folder with one folder of images per class.
        models: registry names, in a shell separated by commas; `narrows info` lists them.
        seeds: how many seeds each model is trained from; two or more give a spread.
        epochs: passes over the training images.
        batch_size: images in a training step.
        image_size: side of the images in pixels; by default 32 for digits, 64 for small digits and folders.
        learning_rate: the peak learning rate.
        output: folder of all comparisons.
        device: "auto", "cpu" or "cuda".

    Raises:
        InvalidArgument: an unknown model or device, no model, a number that is not positive.
        DataError: images that cannot be used.
    """
    check_positive(seeds=seeds, epochs=epochs, batch_size=batch_size)
    if not models:
        raise InvalidArgument("models", expected="at least one registry name", got="none")
    accelerator = accelerator_of(device)
    found = ImageDataModule(data, image_size=image_size).loaded
    # Built before anything is trained, so that a wrong name or size shows at once.
    for name in models:
        create_model(name, **_shape(found))
    folder = new_folder(Path(output))
    tqdm.write(_announcement(found, models, seeds, epochs, folder))

    runs: list[Run] = []
    loaded = {0: _remembered(found)}
    interrupted = False
    with quiet_lightning():
        try:
            for number, (seed, name) in enumerate(product(range(seeds), models), start=1):
                label = f"{number}/{seeds * len(models)} {name}" + (f" seed {seed}" if seeds > 1 else "")
                images = ImageDataModule(data, image_size=image_size, batch_size=batch_size, seed=seed)
                loaded = {seed: loaded.get(seed) or _remembered(images.loaded)}
                images.loaded = loaded[seed]
                torch.manual_seed(seed)
                model = create_model(name, **_shape(found))
                task = Classification(model, num_classes=found.num_classes, learning_rate=learning_rate)
                runs.append(train(task, name, images, folder, label=label, epochs=epochs, accelerator=accelerator))
                _write_runs(runs, folder / "runs.csv")
        except KeyboardInterrupt:
            if not runs:
                raise KeyboardInterrupt("No model was finished yet, nothing is kept.") from None
            interrupted = True
    comparison = Comparison(runs, _costs(runs, found, batch_size, accelerator), folder, interrupted)
    comparison.write_csv(folder / "comparison.csv")
    _write_report(comparison, found, epochs=epochs, batch_size=batch_size)
    return comparison


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


def _remembered(data: ImageData) -> ImageData:
    """The same data with training images kept: all models of a seed see the same, each drawn or read once."""
    return replace(data, train=RememberedImages(data.train))


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.train()
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def _shape(data: ImageData) -> dict[str, Any]:
    return {"num_classes": data.num_classes, "image_size": data.image_size, "channels": data.channels}


def _announcement(data: ImageData, models: Sequence[str], seeds: int, epochs: int, folder: Path) -> str:
    return (
        f"{data.name}: {len(data.train):,} training and {len(data.held_out):,} held-out images of "
        f"{data.image_size} pixels in {data.num_classes} classes (held out: {data.held_out_rule})\n"
        f"{len(models)} models, {seeds} seed{'s' if seeds > 1 else ''}, {epochs} epochs each; results in {folder}"
    )


def _write_runs(runs: Sequence[Run], path: Path) -> None:
    """Every run as a row of a CSV file."""
    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Run)])
        table.writeheader()
        table.writerows(asdict(run) for run in runs)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def narrowest(routings: Sequence[Routing]) -> Routing | None:
    """Where an image's own tokens pass through fewest carriers, the last one of equals; None without any routing.

    The own tokens are those on the finest grid: later stages of a pyramid route what earlier ones have merged.
    """
    finest = max((routing.weights.shape[-1] for routing in routings), default=0)
    own = [routing for routing in reversed(routings) if routing.weights.shape[-1] == finest]
    return min(own, key=lambda routing: carriers_in_use(routing).float().mean().item(), default=None)


def _write_report(comparison: Comparison, data: ImageData, *, epochs: int, batch_size: int) -> None:
    """Write `report.html` and the pictures of a comparison into its folder."""
    seeds = 1 + max(run.seed for run in comparison.runs)
    report = Report(
        "What token bottlenecks cost and keep",
        f"{data.name}: {len(comparison.costs)} models trained on {len(data.train):,} images for {epochs} epochs"
        + (f", from {seeds} seeds each" if seeds > 1 else ""),
    )
    if comparison.interrupted:
        report.paragraph("Interrupted: this page shows the models that were finished.")
    report.paragraph(
        f"Every model saw the same images in the same order, in batches of {batch_size}. Accuracy is the share of the "
        f"{len(data.held_out):,} held-out images it gets right (held out: {data.held_out_rule}). MACs are "
        "multiply-accumulates of one image with the tokens really kept. Tokens: what an image's tokens are at "
        "first, and how many carriers they pass through at the narrowest place. Speeds were taken in turns on one "
        f"machine ({machine()})."
    )
    if data.skipped:
        names = ", ".join(str(path) for path in data.skipped[:5])
        report.paragraph(f"{len(data.skipped)} images could not be read and were skipped: {names}.")
    comparison.add_table(report, "What each model costs and keeps.")
    report.section("Accuracy against cost")
    figure = pareto(comparison.points(), x="million MACs per image", y="held-out accuracy (%)")
    caption = "Models on the line are beaten by none: nothing is cheaper and at least as accurate."
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
