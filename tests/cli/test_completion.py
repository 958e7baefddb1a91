"""Shells complete commands and options."""

import subprocess
import sys

import pytest

from narrows.cli import COMMANDS, SWITCHES, main
from narrows.cli.completion import plain_parser

# The shape checks of the test run wrap the functions whose signatures are read.
pytestmark = pytest.mark.compiled


def test_every_command_and_option_is_known():
    (commands,) = (action.choices for action in plain_parser()._actions if action.choices)
    assert set(commands) == set(COMMANDS)
    known = {name: {option: a for a in sub._actions for option in a.option_strings} for name, sub in commands.items()}
    assert all(set(SWITCHES) <= set(options) for options in known.values())
    assert {"--epochs", "--device", "--data.batch_size", "--config"} <= set(known["fit"])
    assert "segmentation" in known["fit"]["--task"].choices
    assert {"--image_size", "--models", "--device"} <= set(known["compare"])
    assert known["bench"]["--quick"].choices == ["true", "false"]


def test_bash_completes(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "narrows").write_text(capsys.readouterr().out)
    tried = {"narrows comp": "compare", "narrows fit --epo": "--epochs", "narrows reduce --bud": "--budget"}
    for line, wanted in tried.items():
        words = line.split()
        ask = (
            f"source {tmp_path / 'narrows'}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
            "_shtab_narrows; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        given = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()
        assert wanted in given
    assert main(["completion", "cmd"]) == 1
    assert "shell: expected" in capsys.readouterr().err
    assert main(["completion"]) == 2


def test_without_shtab_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "narrows: Completion needs shtab: pip install shtab\n"
