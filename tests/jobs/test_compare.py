"""The main job on a small folder of images: what it leaves, what it says, what Ctrl-C keeps."""

import csv
import re
import signal
from pathlib import Path

import pytest
import torch

from narrows.costs import Cost, Timing
from narrows.data import DigitScenes
from narrows.data.load import load
from narrows.errors import DataError, InvalidArgument
from narrows.hub.models import save_model
from narrows.jobs.compare import MODELS, _settings, compare
from narrows.jobs.comparison import Comparison, ModelCost, Settings, few_steps, narrowest, open_runs
from narrows.jobs.report import carriers_in_use
from narrows.models import load_model
from narrows.routing import Routing
from narrows.training.classification import Classification
from narrows.training.run import Run
from tests.data.folders import write_classes

ASKED = {"data": "x", "models": ["vit_mini"], "seeds": 1, "image_size": 32, "learning_rate": 1e-3}
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


def test_the_report_is_one_file_with_table_plot_and_pictures(comparison: Comparison, folder: Path) -> None:
    page = comparison.report.read_text(encoding="utf-8")
    row = [f"narrows compare --data {folder} --models ats_vit_mini --seeds 2 --epochs 1 --batch_size 8 --image_size 32"]
    for text in (*row, "ats_vit_mini", "Accuracy against cost", "Where tokens went", "±", "from 2 seeds each"):
        assert text in page, text
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    assert re.search(
        r"aria-label=.A row of pictures for each image. Of the first, a blue: ats_vit_mini: \d+ of 64", page
    )
    assert re.search(r">(blue|red) [✓✗]</text>", page), "the class a model gives stands below its picture"
    for fact in ("Date", "Command", "Machine", "Versions"):
        assert f"<dt>{fact}</dt>" in page
    pictures = {path.name for path in (comparison.folder / "pictures").iterdir()}
    assert {"gallery.png", "pareto.png", "ats_vit_mini-blocks.2.png"} <= pictures


def test_ctrl_c_keeps_what_is_finished(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.jobs.comparison._where_tokens_went", lambda *_: None)  # drawn elsewhere
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
    with pytest.raises(InvalidArgument, match="device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'tpu'"):
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


def _comparison(accuracies: dict[str, list[float]], held_out: int) -> Comparison:
    cost = Cost(10, 2e6, 100, Timing((0.5,)), 8, "cpu", "float32")
    found = ModelCost(cost, 8.0, 64, Timing((1.0,)), 2**20)
    runs = [
        Run(model, seed, accuracy, 100, 1.0, Path("x"))
        for model, seeds in accuracies.items()
        for seed, accuracy in enumerate(seeds)
    ]
    names = list(accuracies)
    settings = Settings("my photos", names, 1, 2, 8, 32, 1e-3, 40, held_out, ["a", "b"])
    return Comparison(runs, dict.fromkeys(names, found), Path("x"), settings, held_out=held_out)


def test_points_have_the_mean_and_the_interval_of_images_and_seeds() -> None:
    (point,) = _comparison({"vit": [0.9, 0.94]}, held_out=0).points()
    assert (point.cost, point.quality) == (2e6, pytest.approx(92))
    assert point.spread == pytest.approx(100 * 12.706 * 0.04 / 2**0.5 / 2**0.5, rel=1e-4), (
        "Student, one degree of freedom"
    )
    # Wilson's interval of 5 of 10: 23.66 % to 76.34 %; of 10 of 10: 72.25 % to 100 %, its half.
    assert _comparison({"vit": [0.5]}, 10).margin("vit") == pytest.approx((0.7634 - 0.2366) / 2, abs=1e-4)
    assert _comparison({"vit": [1.0]}, 10).margin("vit") == pytest.approx((1 - 0.7225) / 2, abs=1e-4)
    both = _comparison({"vit": [0.9, 0.92], "ats": [0.8, 0.82]}, 1000)
    images = _comparison({"vit": [0.91], "ats": [0.81]}, 1000).margin("vit")
    assert both.margin("vit") == pytest.approx((images**2 + (4.3027 * 0.01414 / 2**0.5) ** 2) ** 0.5, rel=1e-3)


def test_no_winner_is_named_inside_the_interval() -> None:
    tie = _comparison({"vit": [0.62], "ats": [0.6], "moe": [0.2]}, held_out=24)
    assert tie.best is None
    assert tie.tied() == ["vit", "ats"]
    assert tie.columns["accuracy"] is None
    assert "No difference in accuracy can be told between vit and ats on 24 held-out images" in tie.verdict
    assert f"vit gets 62.0 ± {100 * tie.margin('vit'):.1f} %" in tie.verdict
    clear = _comparison({"vit": [0.62], "ats": [0.6], "moe": [0.9]}, held_out=2400)
    assert (clear.best, clear.columns["accuracy"]) == ("moe", "max")
    ahead = 100 * (clear.margin("moe") ** 2 + clear.margin("vit") ** 2) ** 0.5
    assert clear.verdict.startswith("moe is the most accurate, beyond the 95 % interval: 90.0 ± ")
    assert clear.verdict.endswith(f"28.0 ± {ahead:.1f} points before vit.")
    assert _comparison({"vit": [0.9]}, 24).verdict.startswith("vit gets 90.0 ± ")
    perfect = _comparison({"vit": [1.0], "ats": [1.0]}, 24)
    assert perfect.best is None, "equal is no winner"


def test_a_small_folder_gets_small_batches_and_enough_steps(folder: Path) -> None:
    found = load(str(folder), image_size=32)
    settings = _settings({**ASKED, "epochs": None, "batch_size": None}, found)
    assert (settings.batch_size, settings.num_train) == (4, 32)
    assert settings.steps >= 600
    assert few_steps(settings) == ""
    few = _settings({**ASKED, "epochs": 1, "batch_size": 8}, found)
    assert (few.epochs, few.batch_size, few.steps) == (1, 8, 4)
    assert "Warning: 4 training steps are few" in few_steps(few)
    digits = _settings({**ASKED, "epochs": None, "batch_size": None}, load("digits"))
    assert (digits.epochs, digits.batch_size) == (10, 64)


def _stop_in(model: str, monkeypatch: pytest.MonkeyPatch, *, after: int, number: int) -> None:
    step, steps = Classification.training_step, [0]

    def stopped(self: Classification, *args: object) -> torch.Tensor:
        if type(self.model).__name__ == model:
            steps[0] += 1
            if steps[0] == after:
                signal.raise_signal(number)
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "training_step", stopped)


def test_a_comparison_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch, comparison) -> None:
    monkeypatch.setattr("narrows.jobs.comparison._where_tokens_went", lambda *_: None)  # drawn elsewhere
    asked = {"models": ["vit_mini", "ats_vit_mini"], "seeds": 2, **SETTINGS}
    with monkeypatch.context() as patch:
        _stop_in("ATSViT", patch, after=2, number=signal.SIGTERM)
        found = compare(str(folder), output=tmp_path, **asked)
    assert (found.interrupted, found.unfinished) == (signal.SIGTERM, 3)
    assert f"narrows compare --resume {found.folder}" in found.report.read_text(encoding="utf-8")
    assert (found.folder / "logs" / "ats_vit_mini-seed0" / "last.ckpt").is_file()
    with pytest.raises(InvalidArgument, match=r"epochs: expected 1, with which .* was begun, got 7. Leave it out."):
        compare(resume=found.folder, epochs=7)
    (found.folder / "report.html").unlink()
    only = compare(resume=found.folder, report_only=True, device="cpu")
    assert [run.model for run in only.runs] == ["vit_mini"]
    assert "3 of the runs are to come" in only.report.read_text(encoding="utf-8")
    whole = compare(resume=found.folder, device="cpu")
    assert (whole.interrupted, whole.unfinished) == (0, 0)
    assert [(run.model, run.seed) for run in whole.runs] == [(m, s) for s in (0, 1) for m in asked["models"]]
    assert not list(found.folder.rglob("last.ckpt"))
    for run in whole.runs:
        (same,) = (one for one in comparison.runs if (one.model, one.seed) == (run.model, run.seed))
        weights = load_model(same.folder).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in load_model(run.folder).state_dict().items())


def test_a_model_that_diverges_is_named_and_left_out(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("narrows.jobs.comparison._where_tokens_went", lambda *_: None)  # drawn elsewhere
    step = Classification.training_step

    def broken(self: Classification, *args: object) -> torch.Tensor:
        loss = step(self, *args)  # type: ignore[arg-type]
        return loss * torch.nan if type(self.model).__name__ == "ATSViT" else loss

    monkeypatch.setattr(Classification, "training_step", broken)
    found = compare(str(folder), models=["ats_vit_mini", "vit_mini"], output=tmp_path, **SETTINGS)
    assert found.diverged == [("ats_vit_mini", 0)]
    assert list(found.costs) == ["vit_mini"]
    assert "ats_vit_mini from seed 0 diverged" in found.report.read_text(encoding="utf-8")
    assert [path.name for path in (found.folder / "models").iterdir()] == ["vit_mini-seed0"]
    again = compare(resume=found.folder, report_only=True, device="cpu")
    assert again.diverged == found.diverged


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"resume: expected the folder of a comparison, with settings.json"):
        compare(resume=tmp_path)
    with pytest.raises(InvalidArgument, match="resume: expected the folder of a comparison to report on"):
        compare(report_only=True)


def test_a_model_of_timm_begins_with_the_weights_it_has(folder: Path, tmp_path: Path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=5, img_size=32)
    save_model(theirs, tmp_path / "theirs")
    begun, first = {}, "blocks.0.attn.qkv.weight"
    start = Classification.on_fit_start

    def note(self: Classification) -> None:
        start(self)
        begun[type(self.model).__name__] = (
            self.learning_rate,
            self.model.state_dict()[first].clone(),
        )

    monkeypatch.setattr(Classification, "on_fit_start", note)
    name = f"timm:local-dir:{tmp_path / 'theirs'}"
    found = compare(str(folder), models=[name], output=tmp_path / "runs", learning_rate=1e-3, **SETTINGS)
    rate, weights = begun["VisionTransformer"]
    assert rate == pytest.approx(1e-4)
    assert torch.equal(weights, theirs.state_dict()[first]), "not drawn anew"
    cost = found.costs[name]
    assert (cost.tokens, cost.carried) == (5, 5), "a class token and four patches"
    assert cost.cost.macs > 0
    report = found.report.read_text(encoding="utf-8")
    assert "began with weights from an earlier training and learned at 0.1 of the learning rate" in report
    (saved,) = open_runs(found.runs).values()
    assert (saved.num_classes, saved.classes) == (2, ("blue", "red"))
