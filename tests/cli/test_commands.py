"""Commands translate options into the arguments of a public function, and say what it found."""

import functools
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from narrows.bench import runner
from narrows.bench.rows import Row
from narrows.cli import main
from narrows.jobs import compare as comparison
from narrows.jobs import reduce as reduction
from narrows.models import create_model
from tests.data.folders import write_image
from tests.hub.small_models import save_images, save_ours


@pytest.fixture
def asked(monkeypatch):
    """Puts in the place of a job what keeps its arguments and gives what the test says; the arguments."""
    seen = {}

    def install(module, name, found):
        @functools.wraps(getattr(module, name))
        def record(*args, **arguments):
            seen.update(arguments)
            return found

        monkeypatch.setattr(module, name, record)
        return seen

    return install


def _defaults(function) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


TABLE = "model  accuracy\nvit      0.5000\n"
VERDICT = "No difference can be told."


class Found(SimpleNamespace):
    """What a job gives."""

    columns = dict.fromkeys(["model", "accuracy"])

    def rows(self):
        return [["vit", 0.5]]


def _compared(**what) -> Found:
    known = {"verdict": VERDICT, "report": Path("runs/1/report.html"), "folder": Path("runs/1")}
    return Found(**{"interrupted": 0, **known, **what})


def test_compare_has_the_defaults_of_the_function_it_calls(asked, capsys):
    expected = _defaults(comparison.compare)
    seen = asked(comparison, "compare", _compared())
    assert main(["compare"]) == 0
    assert seen == expected
    assert capsys.readouterr().out == f"{TABLE}{VERDICT}\nReport: runs/1/report.html\n"


def test_compare_passes_its_options_on(asked):
    seen = asked(comparison, "compare", _compared())
    options = "--data photos --models vit_mini,sepvit_mini --seeds 3 --batch-size=8 --image_size 64 --device cpu"
    assert main(["compare", *options.split()]) == 0
    assert seen["models"] == ["vit_mini", "sepvit_mini"]
    assert (seen["data"], seen["seeds"], seen["batch_size"]) == ("photos", 3, 8)
    assert (seen["image_size"], seen["device"]) == (64, "cpu")


def test_an_interrupted_comparison_exits_130_and_says_what_is_kept(asked, capsys):
    asked(comparison, "compare", _compared(interrupted=2))
    assert main(["compare"]) == 130
    assert "The models that were finished are in runs/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--seed 3", 2, "narrows compare: unrecognized arguments: --seed 3. Did you mean --seeds?"),
        ("--epoch 3", 2, "Did you mean --epochs?"),
        ("--lr 3", 2, "Did you mean --learning_rate?"),
        ("--bs 3", 2, "Did you mean --batch_size?"),
        ("photos", 2, "Did you mean --data photos?"),
        ("--btach-size 3", 2, "Did you mean --batch_size?"),
        ("--epochs many", 2, "epochs"),
        ("--zzz", 2, "unrecognized arguments: --zzz. See `narrows compare --help`"),
        ("--data no/such/folder", 1, "data: expected 'digits' or a folder"),
        ("--models vit_mni", 1, "Did you mean 'vit_mini'?"),
        ("--models", 2, "models"),
        ("--models --seeds 2", 2, "models"),
        ("--models ,", 1, "models: expected at least one registry name, got none"),
        ("--epochs 0", 1, "epochs: expected a positive integer, got 0"),
        ("--device tpu", 1, "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'tpu'"),
    ],
)
def test_compare_explains_bad_input(options, code, message, capsys):
    assert main(["compare", *options.split()]) == code
    assert message in capsys.readouterr().err


def _row() -> Row:
    words = {field.name: "" for field in fields(Row) if field.type is str}
    named = {"case": "slots/small", "mode": "eager", "quantity": "forward"}
    return Row(**{**words, **named}, cores=2, threads=2)


def test_bench_races_and_prints(asked, capsys):
    seen = asked(runner, "run", [_row()])
    options = ["--repeats", "3", "--record", "results", "--quick", "--modes", "eager,graph"]
    assert main(["bench", "slots*", *options]) == 0
    expected = {**_defaults(runner.run), "pattern": "slots*", "repeats": 3, "record": "results"}
    assert seen == {**expected, "quick": True, "modes": ["eager", "graph"]}
    assert re.search("slots/small\nmode.*\neager  forward", capsys.readouterr().out)


def test_bench_explains_an_unknown_option(capsys):
    assert main(["bench", "--devise", "cpu"]) == 2
    assert "Did you mean --device?" in capsys.readouterr().err


def _reduced(**written) -> Found:
    chosen = SimpleNamespace(name="ats 0.5")
    known = {"verdict": VERDICT, "report": Path("runs/1/report.html"), "written": written}
    return Found(chosen=chosen, why="needs fewest MACs", **known)


def test_reduce_has_the_defaults_of_the_function_it_calls(asked, capsys):
    expected = _defaults(reduction.reduce)
    seen = asked(reduction, "reduce", _reduced())
    assert main(["reduce"]) == 0
    assert seen == expected
    printed = capsys.readouterr().out
    assert printed == f"{TABLE}{VERDICT}\nChosen: ats 0.5 (needs fewest MACs)\nReport: runs/1/report.html\n"


def test_reduce_passes_its_options_on(asked, capsys):
    seen = asked(reduction, "reduce", _reduced(Saved=Path("reduction.json"), Exported=Path("model.onnx")))
    options = "--model timm:vit_small_patch16_224 --data photos --method ats,topk,tome --budget 0.7,98,2.9G --limit 5"
    files = "--checkpoint weights.pth --save reduction.json --export model.onnx --batch-size=8"
    assert main(["reduce", *options.split(), *files.split()]) == 0
    assert (seen["model"], seen["data"], seen["checkpoint"]) == ("timm:vit_small_patch16_224", "photos", "weights.pth")
    assert (seen["method"], seen["budget"]) == (["ats", "topk", "tome"], ["0.7", "98", "2.9G"])
    assert (seen["limit"], seen["batch_size"]) == (5, 8)
    assert (seen["save"], seen["export"]) == ("reduction.json", "model.onnx")
    printed = capsys.readouterr().out
    assert "Saved: reduction.json" in printed
    assert "Exported: model.onnx" in printed


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--methods ats", 2, "narrows reduce: unrecognized arguments: --methods ats. Did you mean --method?"),
        ("--budgt 0.5", 2, "Did you mean --budget?"),
        ("--limit many", 2, "limit"),
        ("--budget 0", 1, "budget: expected a share (0.5 or 50%)"),
        ("--budget 1.5", 1, "budget: expected a share (0.5 or 50%)"),
        ("--budget 17", 1, "budget: expected a count of 1 to 16 tokens, got 17"),
        ("--budget 9:0.5", 1, "budget: expected numbers of blocks from 0 to 3, got [9]"),
        ("--budget ,", 1, "budget: expected at least one, got none"),
        ("--method tpk", 1, "method: expected one of"),
        ("--model vit_mni", 1, "Did you mean 'vit_mini'?"),
        (
            "--data no/such/folder",
            1,
            "data: expected 'digits', 'small_digits' or a folder of images, got 'no/such/folder', which is no folder",
        ),
        ("--data TEXT", 1, "data: expected a folder with images (.jpg,"),
        ("--checkpoint no.pth", 1, "checkpoint: expected a file with weights, got 'no.pth', which does not exist"),
        ("--export model.pt", 1, "export: expected a file name ending in .onnx"),
    ],
)
def test_reduce_explains_bad_input(options, code, message, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no picture")
    good = {"--model": save_ours(tmp_path / "model"), "--data": save_images(tmp_path / "images")}
    option, value = options.replace("TEXT", str(tmp_path / "text")).split()
    given = {**good, option: value, "--output": str(tmp_path / "runs")}
    assert main(["reduce", *(word for pair in given.items() for word in pair)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    create_model("resampler_vit_mini", channels=1).save_pretrained(folder)
    return folder


def test_show_draws_one_picture_for_each_image_and_bottleneck(saved, tmp_path, capsys):
    assert main(["show", str(saved), "digits", "--limit", "2", "--output", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert {path.name.partition("-")[0] for path in drawn} == {"scene 0", "scene 1"}
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("L").resize((64, 64)))
        assert pixels.std() > 10
    assert f"Pictures of 2 images are in {tmp_path}" in capsys.readouterr().out


def test_show_takes_small_digits_too(tmp_path):
    torch.manual_seed(0)
    create_model("resampler_vit_mini", channels=1, image_size=56).save_pretrained(tmp_path / "model")
    assert main(["show", str(tmp_path / "model"), "small_digits", "--limit", "1", "--output", str(tmp_path)]) == 0
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.png")} == {"scene 0"}


def test_show_takes_files_and_folders_and_registry_names(tmp_path, capsys):
    write_image(tmp_path / "in" / "a.png", size=(50, 40))
    single = write_image(tmp_path / "b.jpg", size=(40, 50))
    arguments = [str(single), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-carriers", "2"]
    assert main(["show", "resampler_vit_mini", *arguments]) == 0
    assert {path.name.partition("-")[0] for path in (tmp_path / "out").iterdir()} == {"a", "b"}
    assert "The weights of resampler_vit_mini are random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vit_mni", "digits"], 1, "Did you mean 'vit_mini'?"),
        (["hf:nobody/nothing", "digits"], 1, "those of transformers are opened as they are"),
        (["vit_mini", "digits"], 1, "model: expected a model with a token bottleneck to show, got 'vit_mini'"),
        (
            ["resampler_vit_mini", "nope.png"],
            1,
            "images: expected image files or folders, got nope.png, which does not",
        ),
        (["resampler_vit_mini", "digits", "--limit", "0"], 1, "limit: expected a positive integer, got 0"),
        (["resampler_vit_mini"], 2, "images"),
        (["resampler_vit_mini", "digits", "--outptu", "x"], 2, "Did you mean --output?"),
    ],
)
def test_show_explains_bad_input(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", *arguments]) == code
    assert message in capsys.readouterr().err


def test_show_lists_the_models_of_a_run_and_draws_all_that_have_a_bottleneck(tmp_path, capsys):
    torch.manual_seed(0)
    for name in ("resampler_vit_mini", "slot_vit_mini", "vit_mini"):
        create_model(name).save_pretrained(tmp_path / "run" / "models" / f"{name}-seed0")
    assert main(["show", str(tmp_path / "run")]) == 0
    listed = capsys.readouterr().out
    for name, kind in {"resampler_vit_mini": "ResamplerViT", "slot_vit_mini": "SlotViT"}.items():
        assert re.search(rf"models/{name}-seed0 +{kind}", listed)
    assert main(["show", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["model"]).name for one in found["models"]] == [
        "resampler_vit_mini-seed0", "slot_vit_mini-seed0", "vit_mini-seed0",
    ]  # fmt: skip
    image = write_image(tmp_path / "a.png", size=(50, 40))
    assert main(["show", str(tmp_path / "run"), str(image), "--output", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    pictures = json.loads(printed.out)["pictures"]
    assert {Path(path).parent.name for path in pictures} == {"resampler_vit_mini-seed0", "slot_vit_mini-seed0"}
    assert all(Path(path).is_file() for path in pictures)
    assert "vit_mini-seed0 has no token bottleneck to show." in printed.err
    (tmp_path / "run" / "models").rename(tmp_path / "elsewhere")
    assert main(["show", str(tmp_path / "run")]) == 1
    assert "model: expected a folder with a model, or that of a run" in capsys.readouterr().err


def test_show_explains_a_folder_without_a_model(tmp_path, capsys):
    assert main(["show", str(tmp_path), "digits"]) == 1
    assert "config.json" in capsys.readouterr().err
