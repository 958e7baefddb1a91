"""The job in miniature: what it measures, what it leaves, what it refuses."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import narrows
from narrows.adapters.token_reduction.targets import parse_budget
from narrows.costs import Timing, macs_per_sample
from narrows.data import DigitScenes, ImageSet
from narrows.demo import vit
from narrows.errors import CannotWrite, InvalidArgument, InvalidType, NarrowsError
from narrows.hub.models import LoadedModel, open_model
from narrows.jobs.images import Images, load_images
from narrows.jobs.reduce import ReductionResult, reduce
from narrows.jobs.report import mean_difference
from narrows.jobs.trials import Trial
from tests.hub.small_models import save_images, save_ours, save_timm, save_transformers


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_ours(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def result(ours: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> ReductionResult:
    folder = tmp_path_factory.mktemp("runs")
    return reduce(
        ours,
        data=images,
        method=["ats", "topk", "tome"],
        budget=["0.75", "4"],
        output=folder / "runs",
        save=folder / "saved" / "reduction.json",
        device="cpu",
    )


def test_every_method_meets_every_budget_beside_the_untouched_model(result: ReductionResult) -> None:
    names = [trial.name for trial in result.trials]
    assert names == [
        "untouched",
        *(f"{method} {budget}" for method in ("ats", "topk", "tome") for budget in ("0.75", "4")),
    ]
    untouched, *reduced = result.trials
    assert untouched.agreement == 1
    for trial in reduced:
        assert fmean(trial.macs) < fmean(untouched.macs), trial.name
        assert trial.kept <= (12 if trial.budget == "0.75" else 4), trial.name
        assert 0 <= trial.agreement <= 1
        assert trial.accuracy is not None
        assert trial.memory > 0
    assert [trial.kept for trial in reduced if trial.method == "topk"] == [12, 4]


def test_macs_are_counted_image_by_image_with_the_tokens_really_kept(
    result: ReductionResult, ours: str, images: str
) -> None:
    opened = open_model(ours)
    batch = load_images(images, opened, limit=100).batch(range(len(result.trials[1].macs)))[0]
    with narrows.reduce_tokens(opened.module, method="ats", budget=0.75), torch.no_grad():
        assert fmean(result.trials[1].macs) == macs_per_sample(opened.module, batch, batch=len(batch))


def test_the_table_names_what_was_measured(result: ReductionResult) -> None:
    head, _, untouched, ats, *_ = str(result).splitlines()
    assert head.split() == [
        "method",
        "budget",
        "accuracy",
        "agreement",
        "tokens",
        "MACs/image",
        "images/s",
        "speed",
        "memory",
    ]
    assert re.search(r"untouched +– +[\d.]+ ± [\d.]+ % +– +16 ", untouched)
    assert re.search(r"ats +0.75 +[\d.]+ ± [\d.]+ % +[\d.]+ ± [\d.]+ % +16 → [\d.]+ .* [\d.]+ ± [\d.]+×", ats)


def test_the_table_is_kept_as_numbers(result: ReductionResult) -> None:
    with (result.folder / "reductions.csv").open() as file:
        untouched, ats, *_ = csv.DictReader(file)
    assert (untouched["method"], untouched["budget"], untouched["tokens"]) == ("untouched", "", "16")
    assert float(ats["tokens"]) == result.trials[1].kept
    assert float(ats["MACs/image"]) == fmean(result.trials[1].macs)


def test_the_report_is_one_file_with_table_curve_and_pictures(result: ReductionResult) -> None:
    page = result.report.read_text(encoding="utf-8")
    for text in (
        "Quality against cost", "Which tokens were kept", "Block by block", "reduce_tokens(model, method=",
        "--method topk --budget 0.75 --limit 1000 --batch_size 32",
    ):  # fmt: skip
        assert text in page, text
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    assert {path.name for path in (result.folder / "pictures").iterdir()} == {
        "tradeoff.png",
        "methods.png",
        "blocks.png",
        "budgets.png",
    }


def _trial(name: str, right: list[int], seconds: Sequence[float], macs: int, **options: object) -> Trial:
    scores = torch.tensor(right, dtype=torch.float32)
    return Trial(
        **{
            "model": Mock(spec=LoadedModel),
            "method": name,
            "same": scores,
            "right": scores,
            "macs": (macs,),
            "kept": 4.0,
            "batch": 8,
        }
        | {"timing": Timing(tuple(seconds)), "memory": 1}
        | options
    )


def _found(*trials: Trial, labelled: bool = True) -> ReductionResult:
    images = Images(Mock(spec=ImageSet), tuple(range(len(trials[0].scores))), "all", labelled=labelled)
    return ReductionResult(trials, images, Path("x"), {})


def test_the_verdict_says_what_is_more_than_chance_and_what_is_not() -> None:
    untouched = _trial("untouched", [1] * 95 + [0] * 5, [1.0, 1.0, 1.0], 100)
    near = _trial("tome", [1] * 94 + [0] * 6, [0.5, 0.5, 0.5], 60)
    # One image of 100 less: Agresti and Min's interval by hand, with half an image more of each of four kinds.
    margin = 100 * 1.959964 * ((2 - 1 / 102) / 102**2) ** 0.5
    assert margin == pytest.approx(2.7, abs=0.05)
    assert _found(untouched, near).verdict == (
        "tome saves 40 % of the MACs; it is 2.00 times as fast (2.00 to 2.00). No difference in accuracy can be told "
        "on 100 images: 1.0 ± 2.7 points (95 % interval)."
    )
    assert _found(untouched, near).columns["accuracy"] is None
    assert _found(untouched, near).columns["images/s"] == "max"
    far = _trial("tome", [1] * 75 + [0] * 25, [0.9, 1.0, 1.1], 60)
    assert "no difference in speed can be told (0.9" in _found(untouched, far).verdict
    assert re.search(r"It loses 20\.0 ± \d\.\d points of accuracy on 100 images", _found(untouched, far).verdict)
    assert _found(untouched, far).columns["accuracy"] == "max"
    assert _found(untouched, far).columns["images/s"] is None


def test_means_of_differences_have_the_interval_of_their_kind() -> None:
    mean, margin = mean_difference(torch.tensor([0.1, 0.3]))
    assert (mean, margin) == (pytest.approx(0.2), pytest.approx(12.7062 * 0.1, rel=1e-4)), (
        "Student, one degree of freedom"
    )
    mean, margin = mean_difference(torch.zeros(10))
    assert mean == 0
    assert margin == pytest.approx(1.959964 * 1 / 12, rel=1e-4), "no image differs, yet the next one may"


def test_the_chosen_one_costs_least_of_those_that_lose_a_point_at_most(result: ReductionResult) -> None:
    near = [trial for trial in result.trials[1:] if trial.quality >= result.untouched.quality - 0.01]
    if near:
        assert result.chosen.macs == min((trial.macs for trial in near), key=fmean)
        assert "needs fewest MACs" in result.why
    else:
        assert result.chosen.quality == max(trial.quality for trial in result.trials[1:])
        assert "loses least" in result.why


def test_what_is_saved_reduces_a_model_the_same_way(result: ReductionResult, ours: str) -> None:
    saved = result.folder.parents[1] / "saved" / "reduction.json"
    arguments = json.loads(saved.read_text())
    assert arguments == json.loads((result.folder / "reduction.json").read_text())
    reduction = narrows.reduce_tokens(narrows.load_model(ours), **arguments)
    assert result.chosen.reduction is not None
    assert reduction.schedule == result.chosen.reduction.schedule
    assert reduction.method.name == result.chosen.reduction.method.name


@pytest.mark.compiled
@pytest.mark.parametrize("method", ["ats", "evit", "tome", "random"])
def test_what_is_exported_is_the_reduced_model(ours: str, images: str, tmp_path: Path, method: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "onnx" / "reduced.onnx"
    few = {"method": [method], "budget": ["0.5"], "device": "cpu", "output": tmp_path / "runs"}
    found = reduce(ours, data=images, export=file, **few)
    model = narrows.load_model(ours)
    assert found.chosen.reduction is not None
    narrows.reduce_tokens(model, method=method, budget=found.chosen.reduction.schedule)
    batch = torch.randn(5, 3, 16, 16)
    (got,) = onnxruntime.InferenceSession(file).run(None, {"images": batch.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(batch).numpy(), atol=1e-4)


def test_models_of_timm_and_of_transformers(images: str, tmp_path: Path) -> None:
    few = {"method": ["topk"], "budget": ["0.5"], "limit": 4, "device": "cpu", "output": tmp_path / "runs"}
    found = reduce("timm:test_vit", checkpoint=save_timm(tmp_path / "weights.pth"), data=images, **few)
    assert (found.tokens, found.trials[1].kept, len(found.images)) == (100, 50, 4)
    found = reduce(f"hf:{save_transformers(tmp_path / 'vit', classifies=False)}", data=images, **few)
    assert (found.tokens, found.trials[1].kept, found.images.labelled, found.classifies) == (16, 8, False, False)
    assert -1 <= found.trials[1].agreement <= 1
    assert "cosine" in found.report.read_text(encoding="utf-8")


def test_without_a_model_one_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.jobs.reduce._write_report", lambda _: None)  # written in other tests
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(DigitScenes, "__len__", lambda _: 256)
    monkeypatch.setattr(vit, "DATA", "digits")
    monkeypatch.setattr(vit, "SIZE", 16)
    monkeypatch.setattr(vit, "MODEL", {"dim": 16, "depth": 4, "heads": 2, "mlp_dim": 16, "global_pool": "max"})
    monkeypatch.setattr(vit.open_scenes_vit, "__defaults__", (1,))
    few = {"method": ["ats"], "budget": ["0.5"], "limit": 20, "device": "cpu", "output": tmp_path / "runs"}
    first = reduce(**few)
    (kept,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert {"config.json", "model.safetensors"} <= {path.name for path in kept.iterdir()}
    monkeypatch.setattr(vit, "train", None)
    second = reduce(**few)
    assert [(one.agreement, one.accuracy) for one in first.trials] == [
        (one.agreement, one.accuracy) for one in second.trials
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": ["0"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got '0'"),
        ({"budget": ["0.0"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got '0.0'"),
        ({"budget": ["1.5"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got '1.5'"),
        ({"budget": ["17"]}, InvalidArgument, "budget: expected a count of 1 to 16 tokens, got 17"),
        ({"budget": ["half"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got 'half'"),
        ({"budget": ["nan"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got 'nan'"),
        ({"budget": ["3:inf"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got '3:inf'"),
        ({"budget": ["150%"]}, InvalidArgument, r"budget: expected a share \(0.5 or 50%\), .*got '150%'"),
        ({"budget": ["9:0.5"]}, InvalidArgument, "budget: expected numbers of blocks from 0 to 3, got"),
        ({"budget": ["0.001M"]}, InvalidArgument, "budget: expected a target of at least"),
        ({"budget": []}, InvalidArgument, "budget: expected at least one, got none"),
        ({"method": ["tpk"]}, InvalidArgument, "method: expected one of .*'topk'.*got 'tpk'"),
        ({"method": []}, InvalidArgument, "method: expected at least one, got none"),
        ({"limit": 0}, InvalidArgument, "limit: expected a positive integer, got 0"),
        ({"device": "tpu"}, InvalidArgument, "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'tpu'"),
        ({"data": None}, InvalidArgument, "data: expected a folder of images to judge by, got none. Add --data"),
        ({"data": "nowhere"}, InvalidArgument, "data: expected 'digits', 'small_digits' or a folder of images"),
        (
            {"model": None, "checkpoint": "weights.pth"},
            InvalidArgument,
            "checkpoint: expected a model that it belongs to",
        ),
        ({"model": None, "image_size": 32}, InvalidArgument, "image_size: expected a model that it belongs to"),
        (
            {"model": None},
            InvalidArgument,
            "model: expected one for the images in .*digit scenes only. Add --model timm:",
        ),
        ({"checkpoint": "nowhere.pth"}, InvalidArgument, "checkpoint: expected a file with weights, .*does not exist"),
        ({"checkpoint_key": "ema"}, InvalidArgument, "checkpoint_key: expected a checkpoint that it is a part of"),
        ({"num_classes": 3}, InvalidArgument, "model: expected a saved model with {'num_classes': 3}"),
        ({"save": "/"}, CannotWrite, "/ cannot be written: Is a directory"),
        ({"output": __file__}, CannotWrite, "test_reduce.py cannot be written: Not a directory"),
        ({"save": f"{__file__}/reduction.json"}, CannotWrite, "reduction.json cannot be written: Not a directory"),
        ({"model": "sepvit_mini"}, InvalidType, "SepViT"),
        ({"export": "model.pt"}, InvalidArgument, "export: expected a file name ending in .onnx"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    ours: str,
    images: str,
    tmp_path: Path,
    arguments: dict[str, object],
    error: type[NarrowsError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "model": ours,
        "data": images,
        "method": ["topk"],
        "budget": ["0.5"],
        "output": tmp_path,
        "device": "cpu",
    }
    # Whatever is wrong is found before anything is trained or measured.
    for work in (
        ("run_trials", "load_images") if arguments.keys() & {"save", "output", "checkpoint"} else ("run_trials",)
    ):
        monkeypatch.setattr(f"narrows.jobs.reduce.{work}", None)
    monkeypatch.setattr(vit, "open_scenes_vit", None)
    with pytest.raises(error, match=message):
        reduce(**{**given, **arguments})
    assert not list(tmp_path.iterdir()), "a refused job leaves no folder behind"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", 0.5),
        ("98", 98),
        (" 1.0 ", 1.0),
        ("3:0.7/6:49", {3: 0.7, 6: 49}),
        ("50%", 0.5),
        ("3:70%/6:7", {3: 0.7, 6: 7}),
    ],
)
def test_budgets_are_read_as_they_are_written(text: str, budget: object) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["150%", "0%", "0", "-3", "1.5", "nan", "3:0/6:0.5", "half", ""])
def test_budgets_that_nothing_can_meet_are_refused_as_they_are_read(text: str) -> None:
    with pytest.raises(InvalidArgument, match="budget: expected a share"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "kind", "goal"),
    [
        ("2.9G", narrows.TargetMACs, 2.9e9),
        ("600MMACs", narrows.TargetMACs, 6e8),
        ("40ms", narrows.TargetLatency, 0.04),
    ],
)
def test_targets_are_read_as_they_are_written(text: str, kind: type, goal: float) -> None:
    found = parse_budget(text)
    assert type(found) is kind
    assert found.goal == pytest.approx(goal)  # type: ignore[attr-defined]
