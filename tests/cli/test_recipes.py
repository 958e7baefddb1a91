import csv
from pathlib import Path

import pytest
import torch

from narrows.cli import main
from narrows.models import list_models
from tests.data.folders import write_classes

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ON_DIGITS = [recipe for recipe in RECIPES if recipe.stem.startswith("digits")]


def test_every_small_model_has_a_recipe():
    assert {path.stem for path in RECIPES} >= {f"digits_{name}" for name in list_models("*_mini")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_what_to_expect(recipe):
    header = recipe.read_text()
    for line in (f"# Command:   narrows fit --config recipes/{recipe.name}", "# Expected:  val/", "# Wall time: "):
        assert line in header


@pytest.mark.parametrize("recipe", ON_DIGITS, ids=lambda path: path.stem)
def test_a_recipe_on_digits_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert main(["fit", "--config", str(recipe), *quick]) == 0


def test_the_imagenet_recipe_trains_on_a_folder_of_images(tmp_path, monkeypatch):
    for part in ("train", "val"):
        write_classes(tmp_path / "images" / part, {"cat": 8, "dog": 8})
    monkeypatch.chdir(tmp_path)
    # All but the size of the job is the recipe's: sepvit_lite at 64 pixels and three steps for sepvit_tiny at 224.
    small = "--model sepvit_lite --data images --data.image_size 64 --data.batch_size 4 --data.num_workers 0"
    alone = "--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto --trainer.enable_progress_bar false"
    short = "--trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.log_every_n_steps 1"
    options = f"{small} {alone} {short}".split()
    assert main(["fit", "--config", str(FOLDER / "imagenet_sepvit_tiny.yaml"), *options]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    group, _ = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.9, 0.999), 0.05, 0.001)
