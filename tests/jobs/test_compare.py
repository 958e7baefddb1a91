"""The main job on a small folder of images: what it leaves, what it says, what Ctrl-C keeps."""

import csv
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrows.data import DigitScenes
from narrows.errors import DataError, InvalidArgument
from narrows.jobs.compare import MODELS, Comparison, ModelCost, compare, narrowest
from narrows.jobs.report import carriers_in_use
from narrows.measure import Cost, Timing
from narrows.models import load_model
from narrows.routing import Routing
from narrows.training.classification import Classification
from narrows.training.run import Run
from tests.data.folders import write_classes

SETTINGS = {"epochs": 1, "image_size": 32, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty images each."""
    return write_classes(tmp_path_factory.mktemp("images"), {"blue": 20, "red": 20})


@pytest.fixture(scope="module")
def comparison(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    output = tmp_path_factory.mktemp("runs")
    return compare(str(folder), models=["vit_mini", "ats_vit_mini", "sepvit_mini"], seeds=2, output=output, **SETTINGS)


def test_every_model_is_trained_from_every_seed_and_saved(comparison: Comparison) -> None:
    assert [(run.model, run.seed) for run in comparison.runs] == [
        (name, seed) for seed in (0, 1) for name in ("vit_mini", "ats_vit_mini", "sepvit_mini")
    ]
    with (comparison.folder / "runs.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [run.model for run in comparison.runs]
    weights = [load_model(run.folder).state_dict()["head.weight"] for run in comparison.runs]
    assert not torch.equal(weights[0], weights[3]), "two seeds gave the same model"
    assert all(0 <= run.accuracy <= 1 and run.images > 0 for run in comparison.runs)


def test_the_table_shows_the_spread_and_what_is_carried(comparison: Comparison) -> None:
    vit, ats, sepvit = str(comparison).splitlines()[2:]
    assert re.search(r"vit_mini +\d+\.\d ± \d+\.\d % .* 64 → 64 ", vit)
    carried = float(re.search(r"64 → ([\d.]+)", ats)[1])
    assert 1 <= carried <= 16
    assert " 256 → 16 " in sepvit, "the windows of the first stage carry the tokens of the image"
    costs = {name: found.cost.macs for name, found in comparison.costs.items()}
    assert costs["ats_vit_mini"] < costs["vit_mini"]


def test_the_report_is_one_file_with_table_plot_and_pictures(comparison: Comparison) -> None:
    page = comparison.report.read_text(encoding="utf-8")
    for text in ("ats_vit_mini", "Accuracy against cost", "Where tokens went", "±", "from 2 seeds each"):
        assert text in page, text
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    pictures = {path.name for path in (comparison.folder / "pictures").iterdir()}
    assert {"gallery.png", "pareto.png", "ats_vit_mini-blocks.2.png"} <= pictures


def test_ctrl_c_keeps_what_is_finished(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Classification.training_step

    def interrupted(self: Classification, *args: object) -> torch.Tensor:
        if type(self.model).__name__ == "ResamplerViT":
            raise KeyboardInterrupt
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    found = compare(str(folder), models=["vit_mini", "resampler_vit_mini"], output=tmp_path, **SETTINGS)
    assert found.interrupted
    assert [run.model for run in found.runs] == ["vit_mini"]
    assert "Interrupted" in found.report.read_text(encoding="utf-8")
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C must go on working afterwards"
    with pytest.raises(KeyboardInterrupt, match="No model was finished"):
        compare(str(folder), models=["resampler_vit_mini"], output=tmp_path, **SETTINGS)


def test_bad_input_is_refused_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="Did you mean 'vit_mini'"):
        compare(str(folder), models=["vit_mni"], output=tmp_path, **SETTINGS)
    with pytest.raises(InvalidArgument, match="models: expected at least one registry name, got none"):
        compare(str(folder), models=[], output=tmp_path, **SETTINGS)
    with pytest.raises(InvalidArgument, match="seeds: expected a positive integer, got 0"):
        compare(str(folder), models=["vit_mini"], seeds=0, output=tmp_path)
    with pytest.raises(InvalidArgument, match="device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"):
        compare(str(folder), models=["vit_mini"], output=tmp_path, device="tpu")
    with pytest.raises(InvalidArgument, match="data: expected 'digits' or a folder"):
        compare(str(folder / "nowhere"), models=["vit_mini"], output=tmp_path)
    with pytest.raises(DataError, match="class"):
        compare(str(folder / "blue"), models=["vit_mini"], output=tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidArgument, match="output: expected a folder, got the file"):
        compare(str(folder), models=["vit_mini"], output=file, **SETTINGS)
    assert list(tmp_path.iterdir()) == [file], "a refused comparison leaves no folder behind"


def test_the_defaults_cover_every_mechanism_on_digits() -> None:
    assert {name.removesuffix("_mini") for name in MODELS} == {
        "vit", "ats_vit", "soft_moe_vit", "sepvit", "slot_vit", "resampler_vit",
    }  # fmt: skip
    assert len(DigitScenes()) == 6000


def test_narrowest_looks_at_the_finest_grid_and_counts_carriers_in_use() -> None:
    kept = torch.zeros(2, 1, 3, 4)
    kept[0, 0, 0, 1] = kept[0, 0, 1, 2] = kept[1, 0, 0, 0] = 1
    fine, coarse = Routing(kept, "kept tokens"), Routing(torch.ones(2, 1, 1, 2), "windows")
    assert carriers_in_use(fine).tolist() == [2, 1]
    assert narrowest([Routing(torch.ones(2, 1, 4, 4), "slots"), fine, coarse]) is fine
    assert narrowest([]) is None


def test_points_have_the_mean_and_the_spread_over_seeds() -> None:
    cost = Cost(10, 2e6, 100, Timing((0.5,)), 8, "cpu", "float32")
    found = ModelCost(cost, 8.0, 64, Timing((1.0,)), 2**20)
    run = Run("vit_mini", 0, 0.9, 100, 1.0, Path("x"))
    comparison = Comparison([run, replace(run, seed=1, accuracy=0.94)], {"vit_mini": found}, Path("x"))
    (point,) = comparison.points()
    assert (point.cost, point.quality) == (2.0, pytest.approx(92))
    assert point.spread == pytest.approx(100 * 0.04 / 2**0.5)
