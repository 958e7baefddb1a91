"""The page that shows what a model costs and keeps under several reductions."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from narrows.hub.models import LoadedModel
from narrows.jobs.images import Images, spread
from narrows.jobs.reduction_result import ReductionResult
from narrows.jobs.report import machine
from narrows.jobs.trials import COUNTED, Trial, routings
from narrows.routing import Routing
from narrows.visualize import Report, curves, gallery, save

if TYPE_CHECKING:
    import matplotlib.figure

NUM_PICTURES = 4
LEAST_SPAN = 8.0  # points of accuracy that the plot shows at least


def write_report(result: ReductionResult, opened: LoadedModel, images: Images, device: torch.device) -> None:
    """Write `report.html` and the pictures of a result into its folder."""
    report = Report(
        f"What token reduction costs and keeps: {result.model}",
        f"{result.tokens} tokens an image; {result.num_images:,} images ({images.rule})",
    )
    report.paragraph(_how_it_was_measured(result))
    report.table(result.columns, result.rows(), "The untouched model and every reduction.", best=result.best)
    report.section("Quality against cost")
    figure = _curves(result)
    save(figure, result.folder / "pictures" / "tradeoff.png")
    report.figure(figure, "A line for each method through its budgets; dashed, what the untouched model reaches.")
    _pictures(report, result, opened, images, device)
    _use(report, result)
    report.write(result.report)


def _how_it_was_measured(result: ReductionResult) -> str:
    agreement = (
        "Agreement is the share of images that get the same class as from the untouched model."
        if result.classifies
        else "Agreement is the mean cosine between the features and those of the untouched model."
    )
    return (
        f"{agreement} Tokens: what an image becomes, and how many of them are left at the end, on average. MACs are "
        f"multiply-accumulates of one image with the tokens really kept, mean and range over {COUNTED} images at most. "
        f"Speed is that of batches of {result.untouched.batch} against the untouched model, taken in turns on one "
        f"machine ({machine()}). Memory is what a batch has alive at its peak beyond the weights."
    )


def _curves(result: ReductionResult) -> "matplotlib.figure.Figure":
    reduced = result.trials[1:]
    lines = {
        method: [result.point(trial) for trial in reduced if trial.method == method]
        for method in dict.fromkeys(trial.method for trial in reduced)
    }
    return curves(lines, result.point(result.untouched), x="MACs per image", y=result.quality, least_span=LEAST_SPAN)


def _pictures(
    report: Report, result: ReductionResult, opened: LoadedModel, images: Images, device: torch.device
) -> None:
    positions = _shown(images)
    batch = images.batch(positions)[0]
    pictures, names = opened.picture(batch), images.names(positions)
    batch = batch.to(device)

    def draw(title: str, columns: dict[str, Routing], caption: str) -> None:
        if not columns:
            return
        figure = gallery(pictures, columns, captions=names)
        save(figure, result.folder / "pictures" / f"{title}.png")
        report.figure(figure, caption)

    budget = _middle(result)
    shown = [trial for trial in result.trials[1:] if trial.budget == budget]
    report.section("Which tokens were kept")
    last = {trial.method: _on_grid(opened, trial, batch)[-1:] for trial in shown}
    draw(
        "methods",
        {method: routing for method, found in last.items() for routing in found},
        f"What every method leaves at the end, at the budget {budget}.",
    )
    chosen = result.chosen
    report.section(f"Block by block: {chosen.name}")
    blocks = {routing.name: routing for routing in _on_grid(opened, chosen, batch)}
    draw("blocks", blocks, "The same images, after each block that reduces: later blocks carry what is left then.")
    report.section(f"Budget by budget: {chosen.method}")
    budgets = {
        f"budget {trial.budget}": _on_grid(opened, trial, batch)[-1:]
        for trial in result.trials[1:]
        if trial.method == chosen.method
    }
    draw(
        "budgets",
        {budget: routing for budget, found in budgets.items() for routing in found},
        "The same images, what is left at the end.",
    )


def _shown(images: Images) -> list[int]:
    """The first of each of a few classes; without labels a few images from all over."""
    if not images.labelled:
        return list(spread(len(images), NUM_PICTURES))
    asked = spread(len(images), 64)
    labels = images.batch(asked)[1].tolist()
    first = dict(reversed(list(zip(labels, asked, strict=True))))
    return [first[label] for label in sorted(first)][:NUM_PICTURES]


def _on_grid(opened: LoadedModel, trial: Trial, batch: torch.Tensor) -> Sequence[Routing]:
    assert trial.reduction is not None
    return [routing for routing in routings(opened, trial.reduction, batch) if routing.grid is not None]


def _middle(result: ReductionResult) -> str:
    """The budget whose MACs are in the middle."""
    budgets = {
        budget: fmean([fmean(trial.macs) for trial in result.trials[1:] if trial.budget == budget])
        for budget in dict.fromkeys(trial.budget for trial in result.trials[1:])
    }
    return sorted(budgets, key=lambda budget: budgets[budget])[len(budgets) // 2]


def _use(report: Report, result: ReductionResult) -> None:
    chosen = result.chosen
    assert chosen.reduction is not None
    report.section("Use it")
    report.paragraph(f"Of these, {chosen.name} {result.why}.")
    report.paragraph(
        f'reduction = narrows.reduce_tokens(model, method="{chosen.method}", '
        f"budget={list(chosen.reduction.schedule)}) reduces your model the same way; reduction.remove() undoes it."
    )
