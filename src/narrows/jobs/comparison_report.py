"""The page that shows a comparison."""

import csv
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from narrows.data import ImageData, picture
from narrows.jobs.comparison import BEST, COLUMNS, Comparison
from narrows.jobs.report import machine
from narrows.models import ImageClassifier, load_model
from narrows.routing import Routing
from narrows.visualize import Report, gallery, overlay, pareto, save

NUM_PICTURES = 6


def carriers_in_use(routing: Routing) -> Int[Tensor, "B"]:
    """How many carriers of each sample read any token at all."""
    return (routing.weights.amax((1, 3)) > 0).sum(1)


def narrowest(routings: Sequence[Routing]) -> Routing | None:
    """Where an image's own tokens pass through fewest carriers, the last one of equals; None without any routing.

    The own tokens are those on the finest grid: later stages of a pyramid route what earlier ones have merged.
    """
    finest = max((routing.weights.shape[-1] for routing in routings), default=0)
    own = [routing for routing in reversed(routings) if routing.weights.shape[-1] == finest]
    return min(own, key=lambda routing: carriers_in_use(routing).float().mean().item(), default=None)


def write_report(comparison: Comparison, data: ImageData, *, epochs: int, batch_size: int) -> None:
    """Write `report.html`, `comparison.csv` and the pictures of a comparison into its folder."""
    columns, rows = COLUMNS, comparison.rows()
    with (comparison.folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([getattr(cell, "value", cell) for cell in row] for row in rows)

    seeds = 1 + max(run.seed for run in comparison.runs)
    report = Report(
        "What token bottlenecks cost and keep",
        f"{data.name}: {len(rows)} models trained on {len(data.train):,} images for {epochs} epochs"
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
    report.table(columns, rows, "What each model costs and keeps.", best=BEST)
    report.section("Accuracy against cost")
    figure = pareto(comparison.points(), x="million MACs per image", y="held-out accuracy (%)")
    save(figure, comparison.folder / "pictures" / "pareto.png")
    report.figure(figure, "Models on the line are beaten by none: nothing is cheaper and at least as accurate.")
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
    routings = {name: models[name].routing(images) for name in comparison.expenses}
    columns = {name: found for name, every in routings.items() if (found := narrowest(every)) is not None}
    if not columns:
        return
    folder = comparison.folder / "pictures"
    report.section("Where tokens went")
    figure = gallery(pictures, columns, captions=captions)
    save(figure, folder / "gallery.png")
    report.figure(figure, f"The first held-out image of {len(captions)} classes, and where its tokens went.")
    for name in columns:
        report.section(name)
        report.paragraph(_summary(models[name]))
        for routing in routings[name]:
            figure = overlay(pictures[0], routing)
            save(figure, folder / f"{name}-{routing.name}.png")
            report.figure(figure, f"In {routing.name}")


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


def _summary(model: ImageClassifier) -> str:
    """The first paragraph of the model's docstring: what its bottleneck does."""
    return " ".join((type(model).__doc__ or "").split("\n\n")[0].split()).replace("`", "")
