import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

import narrows
from narrows import cli
from narrows.cli import COMMANDS, main
from narrows.errors import InvalidArgument
from tests.hub.small_models import save_ours


@pytest.fixture
def command(monkeypatch):
    """A command `info` that does what the test says."""

    def install(run):
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=run))

    return install


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_where_to_start(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in printed
        assert summary in " ".join(printed.split())
    assert "Start here: narrows compare" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_help_of_a_command(command, capsys):
    seen = []
    command(seen.append)
    assert main(["help", "info"]) == main(["info", "--help"]) == 0
    assert seen == [["info", "--help"]] * 2


@pytest.mark.parametrize("argument", ["-V", "--version"])
def test_version(argument, capsys):
    assert main([argument]) == 0
    assert capsys.readouterr().out == f"narrows {narrows.__version__}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cmpare", "narrows: unknown command 'cmpare'. Did you mean 'compare'? See `narrows --help`."),
        ("tst", "narrows: unknown command 'tst'. Did you mean 'test'? See `narrows --help`."),
        ("xyzzy", "narrows: unknown command 'xyzzy'. There are compare, show"),
        ("--frobnicate", "narrows: unknown command '--frobnicate'. There are compare"),
    ],
)
def test_an_unknown_command_is_told_the_nearest_and_exits_2(name, message, capsys):
    assert main([name]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_errors_of_narrows_are_one_line_and_exit_1(command, capsys, monkeypatch):
    def fail(arguments):
        raise InvalidArgument("data", expected="a folder", got="a file")

    command(fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "narrows: data: expected a folder, got a file.\n"
    with pytest.raises(InvalidArgument):
        main(["info", "--debug"])
    monkeypatch.setenv("NARROWS_DEBUG", "1")
    with pytest.raises(InvalidArgument):
        main(["info"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/metrics.csv"), "runs/metrics.csv: No space left on device."),
        (PermissionError(13, "Permission denied"), "A file or a connection: Permission denied."),
        (
            SafetensorError("Error while serializing: I/O error\nmore"),
            "A file of weights cannot be read or written: Error while serializing: I/O error.",
        ),
    ],
)
def test_errors_of_the_system_are_one_line_too(command, capsys, error, told):
    def fail(arguments):
        raise error

    command(fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"narrows: {told}\n"
    with pytest.raises(type(error)):
        main(["info", "--debug"])


def test_other_errors_are_not_hidden(command):
    def fail(arguments):
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_ctrl_c_exits_130_and_says_what_is_kept(command, capsys):
    def stop(arguments):
        raise KeyboardInterrupt("Two models are in runs/1.")

    command(stop)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\nnarrows: stopped. Two models are in runs/1.\n"


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3), ("no", 1)])
def test_an_exit_keeps_its_code(command, code, expected):
    def leave(arguments):
        raise SystemExit(code)

    command(leave)
    assert main(["info"]) == expected


def test_help_and_version_load_nothing_heavy():
    script = (
        "import sys; from narrows.cli import main; main(['--help']); main(['--version']); print(sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for package in ("torch", "numpy", "lightning", "jsonargparse", "matplotlib", "torchvision", "sklearn"):
        assert f"'{package}'" not in loaded


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["fit", "--help"], "lightning", "train"),
        (["generate", "--help"], "transformers", "transformers"),
        (["reduce"], "sklearn", "train"),
        (["export", "timm:vit_tiny_patch16_224", "no.onnx"], "timm", "timm"),
    ],
)
def test_without_an_extra_a_command_says_in_one_line_how_to_get_it(arguments, package, extra):
    script = f"import sys; sys.modules['{package}'] = None; from narrows.cli import main; sys.exit(main({arguments}))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if ended.returncode == 0:  # help needs less than the work
        assert "--help" in arguments
        assert "usage: narrows" in ended.stdout
    else:
        assert ended.returncode == 1
        (line,) = [each for each in ended.stderr.splitlines() if each.startswith("narrows:")]
        assert f"pip install 'narrows[{extra}]'" in line
        assert "Traceback" not in ended.stderr


def test_what_trains_is_not_needed_to_export_a_model(tmp_path):
    save_ours(tmp_path / "model")
    trains = ("lightning", "torchmetrics", "tensorboard", "torchvision", "sklearn", "scipy", "matplotlib")
    missing = f"import sys; sys.modules.update(dict.fromkeys({trains}))"
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "model.pt2")]
    script = f"{missing}; from narrows.cli import main; sys.exit(main({arguments}))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "model.pt2").is_file()


def test_a_message_fits_a_screen_and_drives_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> None:
        raise InvalidArgument("checkpoint", expected="weights", got="a tensor called \x1b[2J\udcff " + "w" * 5000)

    monkeypatch.setattr("narrows.cli.info.run", fail)
    assert main(["info"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(r"narrows: checkpoint: expected weights, got a tensor called \x1b[2J\udcff www")
    assert shown.endswith("(--debug shows all of it)\n")
    assert len(shown) < 15 * 80 + 20


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["fit", "--help-all"], ["info", "--json"]], ids=" ".join)
def test_a_reader_that_went_away_ends_a_command_without_a_word(arguments):
    command = subprocess.Popen(
        [sys.executable, "-m", "narrows", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 141
