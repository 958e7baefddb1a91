"""`narrows reduce` translates options into the arguments of a public function, and says what it found."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from narrows.cli import main
from narrows.cli import reduce as command
from narrows.jobs import reduce as job
from tests.hub.small_models import save_images, save_ours


@pytest.fixture
def asked(monkeypatch):
    """The arguments that the job gets."""
    seen = {}

    class Found(SimpleNamespace):
        def __str__(self):
            return "the table"

    def record(model, **arguments):
        seen.update(arguments, model=model)
        return Found(chosen=SimpleNamespace(name="ats 0.5"), why="needs fewest MACs", report=Path("runs/1/report.html"))

    monkeypatch.setattr(command.job, "reduce", record)
    return seen


def test_without_arguments_it_has_the_defaults_of_the_job(asked, capsys):
    assert main(["reduce"]) == 0
    assert (asked["model"], asked["data"]) == (None, None)
    assert (tuple(asked["methods"]), tuple(asked["budgets"])) == (job.METHODS, job.BUDGETS)
    printed = capsys.readouterr().out
    assert printed == "the table\nChosen: ats 0.5 (needs fewest MACs)\nReport: runs/1/report.html\n"


def test_options_are_passed_on(asked, capsys):
    options = "--model timm:vit_small_patch16_224 --data photos --method ats,topk,tome --budget 0.7,98,2.9G --limit 5"
    files = "--checkpoint weights.pth --save reduction.json --export model.onnx --batch-size=8"
    assert main(["reduce", *options.split(), *files.split()]) == 0
    assert (asked["model"], asked["data"], asked["checkpoint"]) == (
        "timm:vit_small_patch16_224",
        "photos",
        "weights.pth",
    )
    assert (asked["methods"], asked["budgets"]) == (["ats", "topk", "tome"], ["0.7", "98", "2.9G"])
    assert (asked["limit"], asked["batch_size"], asked["save"], asked["export"]) == (
        5,
        8,
        "reduction.json",
        "model.onnx",
    )
    printed = capsys.readouterr().out
    assert "Saved: reduction.json" in printed
    assert "Exported: model.onnx" in printed


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--methods ats", 2, "narrows reduce: unrecognized arguments: --methods ats. Did you mean --method?"),
        ("--budgt 0.5", 2, "Did you mean --budget?"),
        ("--limit many", 2, "limit"),
        ("--budget 0", 1, "budget: expected a count of 1 to 16 tokens, got 0"),
        ("--budget 1.5", 1, "budget: expected a share above 0 and at most 1, got 1.5"),
        ("--budget 17", 1, "budget: expected a count of 1 to 16 tokens, got 17"),
        ("--budget 9:0.5", 1, "budget: expected numbers of blocks from 0 to 3, got [9]"),
        ("--budget ,", 1, "budgets: expected at least one, got none"),
        ("--method tpk", 1, "method: expected one of"),
        ("--model vit_mni", 1, "Did you mean 'vit_mini'?"),
        (
            "--data no/such/folder",
            1,
            "data: expected 'digits', 'small_digits' or a folder of images, got 'no/such/folder', which is none",
        ),
        ("--data TEXT", 1, "images: expected files ending in"),
        ("--checkpoint no.pth", 1, "checkpoint: expected a file with weights, got 'no.pth', which does not exist"),
        ("--export model.pt", 1, "export: expected a file name ending in .onnx"),
    ],
)
def test_bad_input_is_explained(options, code, message, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no picture")
    good = {"--model": save_ours(tmp_path / "model"), "--data": save_images(tmp_path / "images")}
    option, value = options.replace("TEXT", str(tmp_path / "text")).split()
    given = {**good, option: value, "--output": str(tmp_path / "runs")}
    assert main(["reduce", *(word for pair in given.items() for word in pair)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
