import re
import tomllib
from pathlib import Path

import pytest
import torch

from narrows.cli import info, main
from narrows.models import list_models
from narrows.ops.dispatch import Implementation


def test_an_unknown_option_is_told_as_by_every_command(capsys):
    assert main(["info", "--foo"]) == 2
    told = "narrows info: unrecognized arguments: --foo. See `narrows info --help`."
    assert capsys.readouterr().err.split() == told.split()


def test_info_names_versions_extras_devices_models_and_implementations(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        torch.__version__,
        "cpu",
        "slot_attention.reference",
        *list_models(),
        *list_models(task="objects"),
        *info.EXTRAS,
    ):
        assert expected in printed


def test_extras_are_those_of_the_package():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    always = {re.split(r"[<>=\[]", one)[0] for one in declared["dependencies"]}
    packages = {
        extra: {re.split(r"[<>=\[]", one)[0] for one in listed if not one.startswith("narrows[")} - always
        for extra, listed in declared["optional-dependencies"].items()
        if extra != "all"
    }
    assert packages == {extra: set(known) for extra, known in info.EXTRAS.items()}


def test_a_missing_extra_comes_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(info, "EXTRAS", {"onnx": {"torch": "torch", "no-such-package": "none"}})
    found = info.extras()["onnx"]
    assert found == f"torch {info._version('torch')}; missing: no-such-package (pip install 'narrows[onnx]')"


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    known = {
        "reference": Implementation(print, "the formula"),
        "triton": Implementation(print, "one kernel", lambda: "no CUDA device"),
    }
    monkeypatch.setattr(info, "_operations", lambda: [("slots", known)])
    assert info.implementations() == {
        "slots.reference": "the formula",
        "slots.triton": "cannot run here: no CUDA device",
    }


def test_every_operation_lists_its_implementations():
    names = [name for name, _ in info._operations()]
    assert len(names) >= 6
    assert all("reference" in known for _, known in info._operations())


def test_an_unknown_option_exits_2(capsys):
    assert main(["info", "--all"]) == 2
    assert "unrecognized arguments: --all" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "bench", "compare", "show"])
def test_commands_explain_themselves(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"narrows {command}" in capsys.readouterr().out
