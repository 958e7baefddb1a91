"""A model untouched and under several token reductions, side by side: what each costs and keeps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from narrows.adapters import Reduction, reduce_tokens
from narrows.demo import vit as scenes
from narrows.errors import InvalidArgument
from narrows.hub.models import LoadedModel, open_model
from narrows.jobs.budgets import parse_budget
from narrows.jobs.export import check_export, export_onnx
from narrows.jobs.images import Images, load_images
from narrows.jobs.reduction_report import write_report
from narrows.jobs.reduction_result import ReductionResult, write_config
from narrows.jobs.trials import run_trials
from narrows.training.run import accelerator_of, new_folder
from narrows.validation import check_positive

METHODS = ("ats", "topk", "evit", "tome", "random")
BUDGETS = ("0.7", "0.5", "0.35")


def reduce(
    model: str | None = None,
    *,
    data: str | Path | None = None,
    checkpoint: str | Path | None = None,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[str] = BUDGETS,
    limit: int = 1000,
    batch_size: int = 32,
    output: str | Path = "runs",
    save: str | Path | None = None,
    export: str | Path | None = None,
    device: str = "auto",
) -> ReductionResult:
    """Measure a vision transformer untouched and under every method and budget.

    Without a model it takes one of its own, trained once on digit scenes and kept (`open_scenes_vit`). Table, pictures
    and `report.html` are written to `<output>/<time>/`.

    Args:
        model: "timm:<name>", "hf:<name or folder>", a folder written by narrows, or a registry name of narrows.
        data: a folder of images, with one folder for each class or without; "digits" or "small_digits" for models of
            digit scenes; by default what the model that narrows trains was trained on.
        checkpoint: a file with weights in place of those that belong to the model's name.
        methods: names that `reduce_tokens` takes.
        budgets: as `parse_budget` reads them.
        limit: at most so many images.
        batch_size: images in a batch.
        output: folder of all runs.
        save: where to write the chosen reduction (`ReductionResult.chosen`) as JSON.
        export: where to write the model under it as ONNX.
        device: "auto", "cpu" or "cuda".

    Raises:
        InvalidArgument: an unknown model or method, a budget that cannot be met, no images.
        NarrowsError: weights that cannot be downloaded.
    """
    check_positive(limit=limit, batch_size=batch_size)
    for name, given in (("methods", methods), ("budgets", budgets)):
        if not given:
            raise InvalidArgument(name, expected="at least one", got="none")
    place = torch.device(accelerator_of(device))
    if export is not None:
        check_export(export)
    opened, images = _open(model, data, checkpoint, limit, device)
    opened.module.to(place)
    calibration = images.batch(range(min(batch_size, len(images))))[0].to(place)
    reductions = _reductions(opened, methods, budgets, calibration)
    folder = new_folder(Path(output))
    tqdm.write(
        f"{opened.name}: untouched and under {len(reductions) - 1} reductions, on {len(images):,} images "
        f"({images.rule}); results in {folder}"
    )
    trials = run_trials(opened, reductions, images, batch_size=batch_size, device=place)
    tokens = next(reduction for reduction in reductions.values() if reduction is not None).host.num_tokens
    result = ReductionResult(opened.name, trials, tokens, len(images), images.labelled, opened.num_classes > 0, folder)
    write_report(result, opened, images, place)
    write_config(result.chosen, folder / "reduction.json")
    if save is not None:
        write_config(result.chosen, save)
    if export is not None:
        export_onnx(opened, result.chosen, calibration, export)
    return result


def _open(
    model: str | None, data: str | Path | None, checkpoint: str | Path | None, limit: int, device: str
) -> tuple[LoadedModel, Images]:
    if model is None:
        if checkpoint is not None:
            raise InvalidArgument("checkpoint", expected="a model that it belongs to", got="none", hint="Add --model.")
        opened = scenes.open_scenes_vit(device=device)
        return opened, load_images(scenes.DATA if data is None else data, opened, limit=limit)
    if data is None:
        raise InvalidArgument("data", expected="a folder of images to judge by", got="none", hint="Add --data.")
    opened = open_model(model, checkpoint)
    return opened, load_images(data, opened, limit=limit)


def _reductions(
    opened: LoadedModel, methods: Sequence[str], budgets: Sequence[str], images: torch.Tensor
) -> dict[tuple[str, str], Reduction | None]:
    """Every reduction, tried on the model and removed again: what does not work shows before anything is measured."""
    found: dict[tuple[str, str], Reduction | None] = {("untouched", ""): None}
    for method in methods:
        for budget in budgets:
            with reduce_tokens(opened.module, method=method, budget=parse_budget(budget, images=images)) as reduction:
                found[method, budget] = reduction
    return found
