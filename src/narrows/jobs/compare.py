"""`narrows compare`: a baseline and every mechanism under one budget, and what each costs and keeps."""

import csv
import inspect
import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.costs import compare_speed, measure, peak_memory
from narrows.data import ImageData, ImageDataModule, RememberedImages
from narrows.data.tables import Data, data_name, opened
from narrows.errors import Diverged, InvalidArgument, NarrowsError, Terminated
from narrows.files import locked, new_folder, replacing, write_text
from narrows.hub.models import open_model
from narrows.jobs.comparison import (
    ENOUGH_STEPS,
    PRETRAINED_RATE,
    Comparison,
    ModelCost,
    Settings,
    few_steps,
    go_on,
    is_pretrained,
    narrowest,
    open_runs,
    write_report,
)
from narrows.jobs.report import carriers_in_use
from narrows.models import ImageClassifier
from narrows.screen import say, track
from narrows.training.classification import Classification
from narrows.training.run import LAST, Run, name_of, quiet_lightning, train
from narrows.training.task import check_learning_rate
from narrows.validation import check_device, check_positive

MODELS = ("vit_mini", "ats_vit_mini", "soft_moe_vit_mini", "sepvit_mini", "slot_vit_mini", "resampler_vit_mini")
SETTINGS_FILE = "settings.json"
RUNS_FILE = "runs.csv"


def compare(
    data: Data = "digits",
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
            scene), a folder with one folder of images per class, or a table of the `datasets` library: "hf:<name>", a
            folder that `save_to_disk` wrote, from Python a `Dataset` or a `DatasetDict`.
        models: registry names, which begin with random weights (`narrows info` lists them), or "timm:<name>", or a
            folder with a saved model, which begin with the weights they have and a tenth of the learning rate; in a
            shell separated by commas.
        seeds: how many seeds each model is trained from; two or more give a spread.
        epochs: passes over the training images; by default 10, or as many as make 600 steps of a small folder.
        batch_size: images in a training step; by default 64, less for a small folder: a sixteenth of its images.
        image_size: side of the images in pixels; by default 32 for digits, 64 for small digits and all else.
        learning_rate: the peak learning rate of models that begin with random weights.
        output: folder of all comparisons.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: folder of a comparison that was stopped: what is finished is kept, the model at hand goes on where it
            was, and the settings are those it was begun with. Data from Python are given again.
        report_only: with `resume`, train nothing and report on what is finished, while another process trains, say.

    Raises:
        InvalidArgument: an unknown model or device, no model, a number that is not positive; other settings than those
            of the comparison that goes on.
        DataError: images that cannot be used.
        CannotWrite: the output folder or the disk refuses.
    """
    check_positive(seeds=seeds, **{n: v for n, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None})
    check_learning_rate(learning_rate)
    if not models:
        raise InvalidArgument("models", expected="at least one registry name", got="none")
    if report_only and resume is None:
        raise InvalidArgument("resume", expected="the folder of a comparison to report on", got=None)
    place = check_device(device)
    asked = {
        "data": data_name(data), "models": list(models), "seeds": seeds, "epochs": epochs, "batch_size": batch_size,
        "image_size": image_size, "learning_rate": learning_rate,
    }  # fmt: skip
    if resume is None:
        source = opened(data)
        found = ImageDataModule(source, image_size=image_size).loaded
        settings = _settings(asked, found)
    else:
        settings = _read_settings(Path(resume), asked)
        source = opened(settings.data if isinstance(data, str) else data)
        found = ImageDataModule(source, image_size=settings.image_size).loaded
        if (len(found.train), len(found.held_out)) != (settings.num_train, settings.num_held_out) or list(
            found.classes
        ) != list(settings.classes):
            raise InvalidArgument("data", expected=f"the images {resume} was begun with", got=f"others, {found.name}")
    # Built before anything is trained, so that a wrong name or size shows at once.
    for name in settings.models:
        _built(name, found)
    folder = new_folder(output) if resume is None else Path(resume)
    if resume is None:
        write_text(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2) + "\n")
    say(_announcement(found, settings, folder))
    try:
        with quiet_lightning():
            interrupted = 0 if report_only else _train(settings, source, found, folder, place)
        runs, diverged = _read_runs(folder)
        if interrupted and not runs:
            raise Terminated(interrupted)
        if not runs:
            state = "every model diverged" if diverged else "no model is finished yet"
            raise NarrowsError(f"There is nothing to report on in {folder}: {state}.")
        comparison = Comparison(
            runs=runs,
            costs=_costs(runs, found, settings.batch_size, place),
            folder=folder,
            settings=settings,
            interrupted=interrupted,
            held_out=len(found.held_out),
            unfinished=settings.seeds * len(settings.models) - len(runs) - len(diverged),
            diverged=diverged,
        )
        comparison.write_csv(folder / "comparison.csv")
        write_report(comparison, found, place)
    except KeyboardInterrupt as stop:
        nothing = "" if _read_runs(folder)[0] else "No model was finished yet. "
        raise Terminated(getattr(stop, "signum", signal.SIGINT), f"{nothing}{go_on(folder)}") from None
    return comparison


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


def _train(settings: Settings, source: Data, data: ImageData, folder: Path, device: torch.device) -> int:
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
            images = ImageDataModule(source, image_size=settings.image_size, batch_size=settings.batch_size, seed=seed)
            if seed not in loaded:  # all models of a seed see the same images, each drawn or read once
                loaded = {seed: replace(images.loaded, train=RememberedImages(images.loaded.train))}
            images.loaded = loaded[seed]
            torch.manual_seed(seed)
            rate = settings.learning_rate * (PRETRAINED_RATE if is_pretrained(name) else 1)
            task = Classification(_built(name, data), num_classes=data.num_classes, learning_rate=rate)
            try:
                runs.append(train(task, name, images, folder, label=label, epochs=settings.epochs, device=device))
            except Diverged as error:
                say(f"{name}, seed {seed}: {error}", "yellow")
                diverged.append((name, seed))
            except KeyboardInterrupt as stop:
                return getattr(stop, "signum", signal.SIGINT)
            _write_runs(runs, diverged, folder)
            (folder / "logs" / name_of(name, seed) / LAST).unlink(missing_ok=True)
    return 0


def _costs(runs: Sequence[Run], data: ImageData, batch_size: int, device: torch.device) -> dict[str, ModelCost]:
    """What each model costs; speeds are measured in turns, so that a busy machine slows all of them."""
    opened = open_runs(runs)
    models = {name: found.module.to(device) for name, found in opened.items()}
    images, labels = data.held_out.batch(range(min(batch_size, len(data.held_out))))
    images, labels = images.to(device), labels.to(device)
    steps = {name: partial(_training_step, model, images, labels) for name, model in models.items()}
    training = compare_speed(steps, repeats=5, device=device)
    for model in models.values():
        model.eval()
    with torch.no_grad():
        calls = {name: partial(model, images) for name, model in models.items()}
        inference = compare_speed(calls, repeats=9, device=device)
    costs = {}
    for name, model in track(list(models.items()), "measuring", unit="models"):
        narrow, tokens = None, 0
        model.eval()
        if isinstance(model, ImageClassifier):
            narrow, tokens = narrowest(model.routing(images)), math.prod(model.token_grid(images))
        else:
            with torch.no_grad():
                tokens = opened[name].tokens(images).shape[1]
        costs[name] = ModelCost(
            cost=replace(measure(model, images, repeats=1, warmup=0), latency=inference[name]),
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


def _built(name: str, data: ImageData) -> nn.Module:
    """A model for these images: with random weights, or with those it has and a new head."""
    return open_model(name, **_shape(data)).module.train()


def _shape(data: ImageData) -> dict[str, Any]:
    return {"num_classes": data.num_classes, "image_size": data.image_size, "channels": data.channels}


def _announcement(data: ImageData, settings: Settings, folder: Path) -> str:
    few = f"\n{few_steps(settings)}" if few_steps(settings) else ""
    seeds = settings.seeds
    return (
        f"{data.name}: {len(data.train):,} training and {len(data.held_out):,} held-out images of "
        f"{data.image_size} pixels in {data.num_classes} classes (held out: {data.held_out_rule})\n"
        f"{len(settings.models)} models, {seeds} seed{'s' if seeds > 1 else ''}, {settings.epochs} epochs each, "
        f"in batches of {settings.batch_size}; results in {folder}{few}"
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
