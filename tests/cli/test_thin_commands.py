"""`bench` and `compare` only translate options into the arguments of a public function."""

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from narrows.bench.rows import Row
from narrows.cli import bench, compare, main
from narrows.jobs import compare as comparison

DEFAULTS = {name: p.default for name, p in inspect.signature(comparison.compare).parameters.items()}


@pytest.fixture
def compared(monkeypatch):
    """The arguments that `comparison.compare` gets."""
    seen = {}

    def record(data, **arguments):
        seen.update(arguments, data=data)
        return SimpleNamespace(report=Path("runs/1/report.html"), folder=Path("runs/1"), interrupted=data == "stopped")

    monkeypatch.setattr(compare.comparison, "compare", record)
    return seen


def test_compare_has_the_defaults_of_the_function_it_calls(compared, capsys):
    assert main(["compare"]) == 0
    assert {**compared, "models": tuple(compared["models"])} == DEFAULTS
    assert "Report: runs/1/report.html" in capsys.readouterr().out


def test_compare_passes_its_options_on(compared):
    options = "--data photos --models vit_mini,sepvit_mini --seeds 3 --batch-size=8 --image_size 64 --device cpu"
    assert main(["compare", *options.split()]) == 0
    assert compared["models"] == ["vit_mini", "sepvit_mini"]
    assert (compared["data"], compared["seeds"], compared["batch_size"]) == ("photos", 3, 8)
    assert (compared["image_size"], compared["device"]) == (64, "cpu")


def test_an_interrupted_comparison_exits_130_and_says_what_is_kept(compared, capsys):
    assert main(["compare", "--data", "stopped"]) == 130
    assert "The models that were finished are in runs/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--seed 3", 2, "narrows compare: unrecognized arguments: --seed 3. Did you mean --seeds?"),
        ("--epoch 3", 2, "Did you mean --epochs?"),
        ("--btach-size 3", 2, "Did you mean --batch_size?"),
        ("--epochs many", 2, "epochs"),
        ("--zzz", 2, "unrecognized arguments: --zzz. See `narrows compare --help`"),
        ("--data no/such/folder", 1, "data: expected 'digits' or a folder"),
        ("--models vit_mni", 1, "Did you mean 'vit_mini'?"),
        ("--models ,", 1, "models: expected at least one registry name, got none"),
        ("--epochs 0", 1, "epochs: expected a positive integer, got 0"),
        ("--device tpu", 1, "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_compare_explains_bad_input(options, code, message, capsys):
    assert main(["compare", *options.split()]) == code
    assert message in capsys.readouterr().err


def test_bench_races_prints_and_records(monkeypatch, capsys, tmp_path):
    seen = {}

    def race(pattern, *, on_row, **arguments):
        seen.update(arguments, pattern=pattern)
        words = {field.name: "" for field in fields(Row) if field.type is str}
        named = {"case": "slots/small", "mode": "eager", "quantity": "forward"}
        row = Row(**{**words, **named}, cores=2, threads=2)
        on_row(row)
        return [row]

    monkeypatch.setattr(bench, "race", race)
    monkeypatch.setattr(bench, "table", lambda rows: f"{len(rows)} row")
    monkeypatch.setattr(bench, "record_rows", lambda rows, folder: [Path(folder) / "cpu.csv"])
    assert main(["bench", "slots*", "--repeats", "3", "--record", str(tmp_path)]) == 0
    assert seen == {"pattern": "slots*", "device": "cpu", "compile": None, "repeats": 3}
    printed = capsys.readouterr()
    assert "1 row" in printed.out
    assert f"Recorded in {tmp_path}" in printed.out
    assert "slots/small (eager): forward" in printed.err


def test_bench_explains_an_unknown_option(capsys):
    assert main(["bench", "--devise", "cpu"]) == 2
    assert "Did you mean --device?" in capsys.readouterr().err
