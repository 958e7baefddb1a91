"""`narrows reduce`: a model untouched and under several token reductions, and what each costs and keeps."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from narrows.adapters import reduce_tokens, token_reduction
from narrows.adapters.token_reduction.targets import parse_budget
from narrows.costs import evaluating
from narrows.costs.cost import scaled
from narrows.data.scenes import SCENES
from narrows.data.tables import Data, data_name
from narrows.demo import vit
from narrows.errors import InvalidArgument
from narrows.files import check_writable, new_folder, write_text
from narrows.hub.models import LoadedModel, open_model
from narrows.jobs.export import check_file, write_program
from narrows.jobs.images import Images, check_data, evenly_spaced, load_images
from narrows.jobs.report import (
    SPREAD,
    Result,
    add_picture,
    command_of,
    fastest,
    margin_of_share,
    mean_difference,
    mebibytes,
    per_second,
    percent,
)
from narrows.jobs.trials import COUNTED, Candidate, Trial, run_trials
from narrows.routing import Routing
from narrows.screen import say
from narrows.validation import check_choice, check_device, check_positive
from narrows.visualize import Cell, ParetoPoint, Report, curves, describe, gallery

METHODS = ("ats", "topk", "evit", "tome", "random")
BUDGETS = ("0.7", "0.5", "0.35")
OPENING = ("checkpoint", "checkpoint_key", "num_classes", "image_size")
"""Options that a model is opened with."""
MAY_LOSE = 0.01
"""Quality that the chosen reduction may lose."""
NUM_PICTURES = 4
NUM_BLOCKS = 6
"""Blocks that are shown at most."""
LEAST_SPAN = 8.0
"""Points of accuracy that the plot shows at least."""


@dataclass(frozen=True)
class ReductionResult(Result):
    """A model untouched and under several reductions.

    Args:
        trials: the untouched model first.
        images: what it was judged by.
        folder: where report and pictures are.
        options: of the command that does the same again.
        written: what else was written where, by "Saved" and "Exported".
    """

    trials: Sequence[Trial]
    images: Images
    folder: Path
    options: Mapping[str, Any]
    written: dict[str, Path] = field(default_factory=dict)

    @property
    def untouched(self) -> Trial:
        """The model as it was."""
        return self.trials[0]

    @property
    def reduced(self) -> Sequence[Trial]:
        """The model under every reduction."""
        return self.trials[1:]

    @property
    def tokens(self) -> int:
        """How many an image becomes, beside the prefix."""
        reduction = self.reduced[0].reduction
        assert reduction is not None
        return reduction.host.num_tokens

    @property
    def classifies(self) -> bool:
        """Whether the model gives classes, else features."""
        return self.untouched.model.num_classes > 0

    @property
    def chosen(self) -> Trial:
        """The reduction of fewest MACs that loses at most one point of quality; if none does, the one of best quality.

        Quality is accuracy, or without labels agreement with the untouched model.
        """
        kept = [trial for trial in self.reduced if self.loss(trial) <= MAY_LOSE]
        if kept:
            return min(kept, key=lambda trial: fmean(trial.macs))
        return min(self.reduced, key=self.loss)

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
        if self.images.labelled:
            return "accuracy (%)"
        return "same class as the untouched model (%)" if self.classifies else "cosine with the untouched features (%)"

    @property
    def verdict(self) -> str:
        """What the chosen reduction saves and loses, and how sure that is."""
        chosen, number = self.chosen, f"{len(self.images):,} images"
        saved = 1 - fmean(chosen.macs) / fmean(self.untouched.macs)
        speed = chosen.timing.times_faster_than(self.untouched.timing)
        if speed.p20 <= 1 <= speed.p80:
            fast = "no difference in speed can be told"
        else:
            fast = f"it is {speed.median:.2f} times as fast"
        fast += f" ({speed.p20:.2f} to {speed.p80:.2f})"
        if not self.images.labelled:
            what = "of them get the same class" if self.classifies else "is the mean cosine with the untouched features"
            kept = f"On {number}, {self._agreement(chosen).text} {what} (95 % interval)."
        else:
            lost, margin = mean_difference(self.untouched.scores - chosen.scores)
            points = f"{abs(100 * lost):.1f} ± {100 * margin:.1f} points"
            if abs(lost) <= margin:
                kept = f"No difference in accuracy can be told on {number}: {points} (95 % interval)."
            else:
                kept = f"It {'loses' if lost > 0 else 'gains'} {points} of accuracy on {number} (95 % interval)."
        return f"{chosen.name} saves {100 * saved:.0f} % of the MACs; {fast}. {kept}"

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table; what is best stands out only where it is more than chance."""
        speeds = [trial.timing for trial in self.trials]
        return {
            "method": None,
            "budget": None,
            **({"accuracy": _best([trial.scores for trial in self.trials])} if self.images.labelled else {}),
            "agreement": _best([trial.same for trial in self.reduced]),
            "tokens": None,
            "MACs/image": "min",
            "images/s": "max" if fastest(speeds) else None,
            "speed": "max" if fastest(speeds) else None,
            "memory": None,
        }

    @property
    def codes(self) -> Sequence[str]:
        """For each reduction the code that reduces the model so."""
        return ["" if trial.reduction is None else self.code(trial) for trial in self.trials]

    @property
    def command(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The command that measures all of it again."""
        return command_of("reduce", **self.options)

    def code(self, trial: Trial) -> str:
        """Code that reduces the model as it is in a trial, and the command that measures it again."""
        assert trial.reduction is not None, "the untouched model is not reduced"
        again = command_of("reduce", **{**self.options, "method": trial.method, "budget": trial.budget})
        opening = {name: self.options[name] for name in OPENING if self.options[name] is not None}
        arguments = "".join(f", {name}={value!r}" for name, value in opening.items())
        return (
            f"# {again}\n"
            "import narrows\nfrom narrows.hub.models import open_model\n\n"
            f"model = open_model({self.untouched.model.name!r}{arguments}).module  # or your own\n"
            f"reduction = narrows.reduce_tokens(model, method={trial.method!r}, "
            f"budget={list(trial.reduction.schedule)})"
        )

    def rows(self) -> list[list[object]]:
        """A row for each trial, under `columns`."""
        return [self._row(trial) for trial in self.trials]

    def point(self, trial: Trial) -> ParetoPoint:
        """Quality in percent against MACs of an image."""
        speed = f"{per_second(trial.throughput).text} images/s"
        return ParetoPoint(trial.name, fmean(trial.macs), 100 * trial.quality, note=speed)

    def _row(self, trial: Trial) -> list[object]:
        untouched = trial is self.untouched
        faster = trial.timing.times_faster_than(self.untouched.timing)
        accuracy = [] if trial.accuracy is None else [_share(trial.accuracy, len(self.images))]
        low, high = scaled(min(trial.macs)), scaled(max(trial.macs))
        unit = f" {high.partition(' ')[2]}"
        spread = "" if low == high else f" ({low.removesuffix(unit)} to {high})"
        return [
            trial.method,
            trial.budget or None,
            *accuracy,
            None if untouched else self._agreement(trial),
            self.tokens if untouched else Cell(trial.kept, f"{self.tokens} → {trial.kept:.3g}"),
            Cell(fmean(trial.macs), scaled(fmean(trial.macs)) + spread),
            per_second(trial.throughput),
            None if untouched else Cell(faster.median, f"{faster.median:.2f} ± {(faster.p80 - faster.p20) / 2:.2f}×"),
            mebibytes(trial.memory),
        ]

    def _agreement(self, trial: Trial) -> Cell:
        if self.classifies:
            return _share(trial.agreement, len(self.images))
        mean, margin = mean_difference(trial.same)
        return percent(mean, f" ± {100 * margin:.1f}")


def _share(share: float, count: int) -> Cell:
    return percent(share, f" ± {100 * margin_of_share(share, count):.1f}")


def _best(scores: Sequence[Tensor]) -> str | None:
    """'max' where one is better than each other on the same images, beyond the 95 % interval."""
    first, *others = sorted(scores, key=lambda each: each.mean().item(), reverse=True)
    differences = [mean_difference(first - other) for other in others]
    return "max" if all(mean > margin for mean, margin in differences) else None


def reduce(
    model: str | None = None,
    *,
    data: Data | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    method: Sequence[str] = METHODS,
    budget: Sequence[str] = BUDGETS,
    limit: int = 1000,
    batch_size: int = 32,
    output: str | Path = "runs",
    save: str | Path | None = None,
    export: str | Path | None = None,
    device: str = "auto",
) -> ReductionResult:
    """Report what a vision transformer costs and keeps when it carries fewer tokens.

    It is measured untouched and under every method and budget. Table, pictures and `report.html` are written to
    `<output>/<time>/`, and there the chosen reduction (`ReductionResult.chosen`) as `reduction.json`.

    Args:
        model: timm:<name>, hf:<name or folder>, a folder written by narrows, or a registry name; by default a small
            vision transformer that is trained on digit scenes, once, in a few minutes, and kept.
        data: a folder of images, with one folder for each class (for accuracy too) or without; a table of the
            `datasets` library: "hf:<name>", a folder that `save_to_disk` wrote, from Python a `Dataset` or a
            `DatasetDict`; "digits" or "small_digits" for models of digit scenes.
        checkpoint: a file with weights for the model, as training scripts leave it (safetensors, .pth, .ckpt, with or
            without optimizer and arguments beside them); nothing is downloaded then.
        checkpoint_key: which weights in that file, "model_ema" or "teacher" say; by default it is found out.
        num_classes: width of the head, 0 for features; by default as the checkpoint or the model has it.
        image_size: side of the images, for models that take any; position embeddings are interpolated.
        method: names that `reduce_tokens` takes, in a shell separated by commas.
        budget: each a share of the tokens (0.5 or 50%), a count (98), MACs per image (2.9G), the time of a batch
            (40ms), or shares block by block (3:0.7/6:0.49/9:0.34), in a shell separated by commas.
        limit: at most so many images.
        batch_size: images in a batch.
        output: folder of all runs.
        save: file for the chosen reduction, as JSON that narrows.reduce_tokens(model, **json) takes.
        export: file for the model under the chosen reduction, as ONNX (.onnx) or a program of torch.export (.pt2).
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        InvalidArgument: an unknown model or method, a budget that cannot be met, no images, weights of another model.
        CannotWrite: output, save or export cannot be written.
        NarrowsError: weights that cannot be downloaded.
    """
    options = {
        "model": model, "data": data if data is None else data_name(data), "checkpoint": checkpoint,
        "checkpoint_key": checkpoint_key, "num_classes": num_classes, "image_size": image_size,
        "method": list(method), "budget": list(budget), "limit": limit, "batch_size": batch_size,
    }  # fmt: skip
    check_positive(limit=limit, batch_size=batch_size)
    place = check_device(device)
    for name, given in (("method", method), ("budget", budget)):
        if not given:
            raise InvalidArgument(name, expected="at least one", got="none")
    for each in method:
        check_choice("method", each, tuple(token_reduction.METHODS))
    for each in budget:
        parse_budget(each)
    if export is not None:
        check_file(export)
    if save is not None:
        check_writable(save)
    check_writable(output, folder=True)
    opening = {name: options[name] for name in OPENING if name != "checkpoint" and options[name] is not None}

    def check(untrained: LoadedModel) -> None:
        _reduced(untrained, method, budget, torch.rand(2, untrained.channels, *untrained.size))

    # Before the model: nothing is trained or downloaded for a mistyped path.
    source = None if data is None else check_data(data)
    loaded = _open(model, source, checkpoint, opening, lambda: vit.open_scenes_vit(device=device, check=check))
    for note in loaded.notes:
        say(f"{note}.")
    images = load_images(vit.DATA if source is None else source, loaded, limit=limit)
    loaded.module.to(place)
    calibration = images.batch(range(min(batch_size, len(images))))[0].to(place)
    candidates = [Candidate(loaded), *_reduced(loaded, method, budget, calibration)]
    folder = new_folder(Path(output))
    say(
        f"{loaded.name}: untouched and under {len(candidates) - 1} reductions, on {len(images):,} images "
        f"({images.rule}); results in {folder}"
    )
    result = ReductionResult(run_trials(candidates, images, batch_size=batch_size), images, folder, options)
    result.write_csv(folder / "reductions.csv")
    _write_report(result)
    _write_config(result.chosen, folder / "reduction.json")
    if save is not None:
        _write_config(result.chosen, Path(save))
        result.written["Saved"] = Path(save)
    if export is not None:
        with result.chosen.applied():
            exported = write_program(loaded, export, what=f"{loaded.name} under {result.chosen.name}")
        say(str(exported))
        result.written["Exported"] = exported.path
    return result


def _open(
    model: str | None,
    data: Data | None,
    checkpoint: str | Path | None,
    opening: Mapping[str, Any],
    by_default: Callable[[], LoadedModel],
) -> LoadedModel:
    """The model named, or that of narrows where none is."""
    if model is None:
        for name, value in ({"checkpoint": checkpoint} | dict(opening)).items():
            if value is not None:
                raise InvalidArgument(name, expected="a model that it belongs to", got="none", hint="Add --model.")
        if data is not None and data not in tuple(SCENES):
            raise InvalidArgument(
                "model",
                expected=f"one for the images in {data_name(data)!r}",
                got="none",
                hint="The model that narrows trains for itself reads digit scenes only. Add --model timm:<name>, say.",
            )
        return by_default()
    if data is None:
        raise InvalidArgument("data", expected="a folder of images to judge by", got="none", hint="Add --data.")
    return open_model(model, checkpoint, **opening)


def _reduced(model: LoadedModel, methods: Sequence[str], budgets: Sequence[str], images: Tensor) -> list[Candidate]:
    """Every reduction, tried on the model and removed again: what does not work shows before anything is measured."""
    found = []
    for method, budget in product(dict.fromkeys(methods), dict.fromkeys(budgets)):
        with reduce_tokens(model.module, method=method, budget=parse_budget(budget, images=images)) as reduction:
            found.append(Candidate(model, reduction, method, budget))
    return found


def _write_config(trial: Trial, path: Path) -> None:
    """The reduction of a trial as JSON: `narrows.reduce_tokens(model, **json.load(file))` does the same again."""
    assert trial.reduction is not None, "the untouched model has nothing to write"
    entries = {"method": trial.method, "budget": list(trial.reduction.schedule)}
    write_text(path, json.dumps(entries) + "\n")


def _write_report(result: ReductionResult) -> None:
    """Write `report.html` and the pictures of a result into its folder."""
    images, reduced, model = result.images, result.reduced, result.untouched.model
    report = result.begin_report(
        f"What token reduction costs and keeps: {model.name}",
        f"{result.tokens} tokens an image; {len(images):,} images ({images.rule})",
        model.device,
    )
    if model.notes:
        report.paragraph(" ".join(f"{note}." for note in model.notes))
    result.add_table(report, "The untouched model and every reduction.")
    agreement = (
        "Agreement is the share of images that get the same class as from the untouched model."
        if result.classifies
        else "Agreement is the mean cosine between the features and those of the untouched model."
    )
    report.paragraph(
        f"{agreement} Behind shares stands the 95 % interval that the number of images leaves. Tokens: what an image "
        "becomes, and how many of them are left at the end, on average. MACs are multiply-accumulates of one image "
        f"with the tokens really kept, mean and range over {COUNTED} images at most. Speed is that of batches of "
        f"{result.untouched.batch} against the untouched model, taken in turns. {SPREAD} Memory is what a batch has "
        "alive at its peak beyond the weights."
    )
    report.section("Quality against cost")
    lines = {
        method: [result.point(trial) for trial in reduced if trial.method == method]
        for method in dict.fromkeys(trial.method for trial in reduced)
    }
    untouched = result.point(result.untouched)
    bounds = (0.0, 100.0) if result.classifies else (-100.0, 100.0)
    figure = curves(lines, untouched, x="MACs per image", y=result.quality, least_span=LEAST_SPAN, bounds=bounds)
    caption = "A line for each method through its budgets; dashed, what the untouched model reaches."
    alt = f"{result.quality} against MACs per image. " + "; ".join(
        f"{point.name}: {point.quality:.1f} at {scaled(point.cost)}" for point in map(result.point, result.trials)
    )
    add_picture(report, figure, result.folder / "pictures" / "tradeoff.png", caption, alt=f"{alt}.")
    _add_token_pictures(report, result)
    report.section("Use it")
    report.paragraph(f"Of these, {result.chosen.name} {result.why}.")
    report.code(result.code(result.chosen))
    report.paragraph("reduces the model the same way; reduction.remove() undoes it.")
    report.write(result.report)


def _add_token_pictures(report: Report, result: ReductionResult) -> None:
    """Which tokens were kept: by every method, block by block, and budget by budget."""
    positions = _positions_to_show(result.images)
    batch, labels = result.images.batch(positions)
    model, chosen = result.untouched.model, result.chosen
    pictures, names = model.picture(batch), result.images.names(positions)
    batch = batch.to(model.device)

    def on_grid(trial: Trial) -> list[Routing]:
        return [routing for routing in trial.routing(batch) if routing.grid is not None]

    def at_the_end(trials: Mapping[str, Trial]) -> dict[str, Routing]:
        return {name: routing for name, trial in trials.items() for routing in on_grid(trial)[-1:]}

    def draw(
        section: str, file: str, columns: Mapping[str, Routing], caption: str, trials: Mapping[str, Trial]
    ) -> None:
        report.section(section)
        if not columns:
            return
        below = {name: _answers(trial, batch, labels, result.images) for name, trial in trials.items()}
        figure = gallery(pictures, columns, captions=names, below=below)
        seen = " ".join(f"{name}: {describe(routing)}" for name, routing in columns.items())
        alt = f"A row of pictures for each image. Of the first, {names[0]}: {seen}"
        add_picture(report, figure, result.folder / "pictures" / f"{file}.png", caption, alt=alt)

    by_budget: dict[str, list[float]] = {}
    for trial in result.reduced:
        by_budget.setdefault(trial.budget, []).append(fmean(trial.macs))
    middle = sorted(by_budget, key=lambda budget: fmean(by_budget[budget]))[len(by_budget) // 2]
    below = " Below each picture stands the class that the model gives it." if result.classifies else ""
    untouched = {"image": result.untouched}
    methods = {trial.method: trial for trial in result.reduced if trial.budget == middle}
    draw(
        "Which tokens were kept",
        "methods",
        at_the_end(methods),
        f"What every method leaves at the end, at the budget {middle}.{below}",
        {**untouched, **methods},
    )
    blocks = on_grid(chosen)
    shown = [blocks[index] for index in evenly_spaced(len(blocks), NUM_BLOCKS - 1)] + blocks[-1:]
    draw(
        f"Block by block: {chosen.name}",
        "blocks",
        {routing.name: routing for routing in shown},
        "The same images, after blocks that reduce: later blocks carry what is left then.",
        untouched,
    )
    budgets = {f"budget {trial.budget}": trial for trial in result.reduced if trial.method == chosen.method}
    draw(
        f"Budget by budget: {chosen.method}",
        "budgets",
        at_the_end(budgets),
        f"The same images, what is left at the end.{below}",
        {**untouched, **budgets},
    )


def _answers(trial: Trial, batch: Tensor, labels: Tensor, images: Images) -> list[str]:
    """The class that each image gets, and where labels are known whether it is right; nothing of features."""
    if not trial.model.num_classes:
        return [""] * len(batch)
    with evaluating(trial.model.module):
        answers = trial(batch).argmax(-1).tolist()
    classes = images.classes or trial.model.classes
    named = [classes[answer] if answer < len(classes) else f"class {answer}" for answer in answers]
    if not images.labelled:
        return named
    return [
        f"{name} {'✓' if answer == label else '✗'}"
        for name, answer, label in zip(named, answers, labels.tolist(), strict=True)
    ]


def _positions_to_show(images: Images) -> list[int]:
    """The first of each of a few classes; without labels a few images from all over."""
    if not images.labelled:
        return list(evenly_spaced(len(images), NUM_PICTURES))
    asked = evenly_spaced(len(images), 64)
    labels = images.batch(asked)[1].tolist()
    first = dict(reversed(list(zip(labels, asked, strict=True))))
    return [first[label] for label in sorted(first)][:NUM_PICTURES]
