"""Recipes of `recipes/objects`, on small folders in the layouts they name and with a small backbone."""

from pathlib import Path

import pytest

from narrows.cli import main
from narrows.hub.models import save_model
from tests.data.object_folders import write_coco, write_movi, write_ytvis

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "objects").glob("*.yaml"))
QUICK = "--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.devices 1 --data.num_workers 0"


def data_of(recipe: Path, root: Path) -> Path:
    kind = recipe.stem.rpartition("_")[0]
    if kind == "coco":
        return write_coco(root / "coco")
    if kind == "ytvis":
        return write_ytvis(root / "ytvis", frames=4)
    for part in ("train", "validation"):
        write_movi(root / kind / f"{kind}-{part}.tfrecord-00000-of-00001", clips=2, frames=5)
    return root / kind


def test_papers_have_their_recipes_and_these_say_what_to_expect_and_by_whom() -> None:
    assert {path.stem.rpartition("_")[0] for path in RECIPES} == {"coco", "movi_c", "movi_e", "ytvis"}
    for path in RECIPES:
        header = path.read_text()
        for line in (f"# Command:   narrows fit --config recipes/objects/{path.name}", "# Expected:  ", "arXiv 2"):
            assert line in header


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_and_validates(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    save_model(timm.create_model("test_vit", num_classes=0), tmp_path / "vit")
    small = f"--model.backbone timm:local-dir:{tmp_path / 'vit'} --data.image_size 96 --data.batch_size 1"
    data = data_of(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(recipe), "--data", str(data), *small.split(), *QUICK.split()]) == 0
