"""The main job: train the baseline and every mechanism under one budget, and say what each costs and keeps."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from narrows.data import ImageData, ImageDataModule, RememberedImages
from narrows.errors import InvalidArgument
from narrows.jobs.comparison import Comparison, Expense, write_runs
from narrows.jobs.comparison_report import carriers_in_use, narrowest, write_report
from narrows.measure import compare_speed, measure, peak_memory
from narrows.models import create_model, load_model
from narrows.training.classification import Classification
from narrows.training.run import Run, accelerator_of, new_folder, quiet_lightning, train
from narrows.validation import check_positive

MODELS = ("vit_mini", "ats_vit_mini", "soft_moe_vit_mini", "sepvit_mini", "slot_vit_mini", "resampler_vit_mini")


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
        models: registry names; `narrows info` lists them.
        seeds: how many seeds each model is trained from; two or more give a spread.
        epochs: passes over the training images.
        batch_size: images in a training step.
        image_size: side of the images in pixels; by default 32 for digits, 64 for small digits and folders.
        learning_rate: at its highest.
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
    # Built before anything is trained: a wrong name or size must not cost the time of the others.
    for name in models:
        create_model(name, **_shape(found))
    folder = new_folder(Path(output))
    tqdm.write(_announcement(found, models, seeds, epochs, folder))

    runs: list[Run] = []
    loaded = {0: _drawn_once(found)}
    interrupted = False
    with quiet_lightning():
        try:
            for number, (seed, name) in enumerate(product(range(seeds), models), start=1):
                label = f"{number}/{seeds * len(models)} {name}" + (f" seed {seed}" if seeds > 1 else "")
                images = ImageDataModule(data, image_size=image_size, batch_size=batch_size, seed=seed)
                loaded = {seed: loaded.get(seed) or _drawn_once(images.loaded)}
                images.loaded = loaded[seed]
                torch.manual_seed(seed)
                model = create_model(name, **_shape(found))
                task = Classification(model, num_classes=found.num_classes, learning_rate=learning_rate)
                runs.append(train(task, name, images, folder, label=label, epochs=epochs, accelerator=accelerator))
                write_runs(runs, folder / "runs.csv")
        except KeyboardInterrupt:
            if not runs:
                raise KeyboardInterrupt("No model was finished yet, nothing is kept.") from None
            interrupted = True
    comparison = Comparison(runs, _expenses(runs, found, batch_size, accelerator), folder, interrupted)
    write_report(comparison, found, epochs=epochs, batch_size=batch_size)
    return comparison


def _expenses(runs: Sequence[Run], data: ImageData, batch_size: int, accelerator: str) -> dict[str, Expense]:
    """What each model costs; speeds are taken in turns, so that a slow spell of the machine hits all of them."""
    device = torch.device(accelerator)
    models = {run.model: load_model(run.folder).to(device) for run in reversed(runs)}
    models = {name: models[name] for name in dict.fromkeys(run.model for run in runs)}
    images, labels = data.held_out.batch(range(min(batch_size, len(data.held_out))))
    images, labels = images.to(device), labels.to(device)
    steps = {name: partial(_training_step, model, images, labels) for name, model in models.items()}
    training = compare_speed(steps, repeats=5, device=device)
    expenses = {}
    for name, model in tqdm(models.items(), desc="measuring", unit="model"):
        narrow = narrowest(model.eval().routing(images))
        tokens = math.prod(model.token_grid(images))
        expenses[name] = Expense(
            cost=measure(model, images),
            carried=float(tokens) if narrow is None else carriers_in_use(narrow).float().mean().item(),
            tokens=tokens,
            training=training[name],
            memory=peak_memory(steps[name], device),
        )
    return expenses


def _drawn_once(data: ImageData) -> ImageData:
    """The same, for all models of a seed: they see the same images, and each is drawn or read once."""
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
