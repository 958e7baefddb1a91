"""What commands print: tables that fit the screen, and JSON of a shape that docs/commands.md describes."""

import json
import re
import sys
from pathlib import Path

import pytest

from narrows._version import __version__
from narrows.bench import runner
from narrows.cli import answer, main
from narrows.jobs import compare, discover, generate
from narrows.visualize import Cell
from narrows.visualize.tables import ScreenTable, parts
from tests.cli.test_commands import _row
from tests.hub.small_models import save_images, save_ours
from tests.jobs.test_compare import _comparison
from tests.test_screen import Terminal

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
WIDE = ScreenTable(
    {"model": None, "accuracy": "max", "MACs/image": "min", **{f"column number {i}": None for i in range(5)}},
    [
        ["soft_moe_vit_mini", Cell(0.951, "95.1 ± 0.6 %"), Cell(2e6, "2.00 M"), *["12,345,678"] * 5],
        ["vit_mini", Cell(0.962, "96.2 ± 0.5 %"), Cell(3e6, "3.00 M"), *["1"] * 5],
    ],
)


@pytest.mark.parametrize("width", [40, 79, 80, 100, 117, 200])
def test_a_table_is_as_wide_as_the_screen_and_no_cell_is_broken(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    answer("compare", dict, WIDE, "A verdict.")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    for row in WIDE.rows:
        for cell in row:
            assert (cell.text if isinstance(cell, Cell) else cell) in printed
    heads = " ".join(WIDE.columns).split()
    assert all(re.search(rf"(^| ){re.escape(word)}( |$)", printed, re.MULTILINE) for word in heads)
    times = len([line for line in lines if line.startswith("soft_moe_vit_mini")])
    assert (
        times == len([line for line in lines if line.startswith("vit_mini")]) == {40: 7, 117: 1, 200: 1}.get(width, 2)
    )


def test_columns_are_parted_between_cells():
    assert parts([10, 8, 8, 8], names=1, width=30) == [[0, 1, 2], [0, 3]]
    assert parts([10, 8], names=1, width=80) == [[0, 1]]
    assert parts([10, 50, 8, 8], names=1, width=30) == [[0, 1], [0, 2, 3]]
    assert parts([10, 5], names=2, width=80) == [[0, 1]]


def test_on_a_terminal_the_best_stands_out(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Terminal())
    answer("compare", dict, WIDE)
    shown = sys.stdout.getvalue()
    assert re.search(r"\x1b\[1;32m96.2 ± 0.5 %", shown)
    assert re.search(r"\x1b\[1;32m *2.00 M", shown)
    assert not re.search(r"\x1b\[1;32m *(95.1|3.00)", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    answer("compare", dict, WIDE)
    assert "32m" not in sys.stdout.getvalue()


def _keys(value: object) -> set[str]:
    """Every name in a JSON document."""
    if isinstance(value, dict):
        return {*value, *(name for one in value.values() for name in _keys(one))}
    return {name for one in value for name in _keys(one)} if isinstance(value, list) else set()


def _object(capsys, *line: str) -> dict:
    """What a command gives with --json, when it works and nothing else is on stdout."""
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["narrows"]) == (line[0], __version__)
    return found


def test_results_as_json(tmp_path, capsys, monkeypatch):
    run = discover.ObjectRun(0, 0.5, 0.4, 0.6, float("nan"), 0.1, 5.5, 12.0, "runs/x", ("few slots",))
    stubs = {
        (compare, "compare"): _comparison({"a": [0.9, 0.8], "b": [0.5, 0.6]}, 1000),
        (discover, "discover"): discover.Discovery([run], 10, tmp_path, {}),
        (generate, "generate"): "two cats",
        (runner, "run"): [_row()],
    }
    for (module, name), found in stubs.items():
        real = getattr(module, name)
        monkeypatch.setattr(module, name, _like(real, found))
    found = _object(capsys, "compare")
    assert [one["model"] for one in found["models"]] == ["a", "b"]
    assert found["models"][0]["accuracies"] == [0.9, 0.8]
    assert found["models"][0]["accuracy"] == pytest.approx(0.85)
    assert _object(capsys, "discover")["runs"][0]["attention_mbo"] is None, "what is no number is null"
    assert _object(capsys, "generate")["text"] == "two cats"
    assert _object(capsys, "bench")["rows"][0]["case"] == "slots/small"
    assert "cpu" in _object(capsys, "info")["devices"]


def _like(function, found):
    import functools

    return functools.wraps(function)(lambda *args, **options: found)


def test_results_of_reductions_and_exports_as_json(tmp_path, capsys):
    model, images = save_ours(tmp_path / "model"), save_images(tmp_path / "images")
    few = ["--method", "topk", "--budget", "0.5", "--limit", "4", "--output", str(tmp_path / "runs")]
    found = _object(capsys, "reduce", "--model", model, "--data", images, *few, "--device", "cpu")
    assert [one["method"] for one in found["trials"]] == ["untouched", "topk"]
    assert found["chosen"]["method"] == "topk"
    assert Path(found["report"]).is_file()
    exported = _object(capsys, "export", model, str(tmp_path / "x.pt2"))
    assert Path(exported["file"]).is_file()
    assert exported["differences"][0]["difference"] < 1e-3
    for name in _keys(found) | _keys(exported):
        assert f"`{name}`" in DOCUMENTED, f"docs/commands.md does not say what {name} is"


def test_quiet_leaves_the_result_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # how wide columns are depends on the speeds in them
    model, images = save_ours(tmp_path / "model"), save_images(tmp_path / "images")
    few = ["--method", "topk", "--budget", "0.5", "--limit", "4", "--output", str(tmp_path / "runs")]
    line = ["reduce", "--model", model, "--data", images, *few, "--device", "cpu"]
    assert main([*line, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Chosen: topk 0.5" in printed.out
    assert main(line) == 0
    again = capsys.readouterr()
    assert "results in" in again.err
    assert again.out.splitlines()[0].split() == printed.out.splitlines()[0].split()
