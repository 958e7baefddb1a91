from pathlib import Path

import pytest

from narrows.cli import main
from narrows.models import list_models

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_every_small_model_has_a_recipe():
    assert {path.stem for path in RECIPES} >= {f"digits_{name}" for name in list_models("*_mini")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_says_what_to_expect(recipe, tmp_path, monkeypatch):
    header = recipe.read_text()
    assert f"# Command:   narrows fit --config recipes/{recipe.name}" in header
    for line in ("# Expected:  val/accuracy", "# Wall time: "):
        assert line in header
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert main(["fit", "--config", str(recipe), *quick]) == 0
