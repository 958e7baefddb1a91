"""Every option of every command, read from its parser, with good and bad values; nothing is trained."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from lightning.pytorch import Trainer

from narrows.bench import runner
from narrows.cli import COMMANDS, main
from narrows.cli.parsing import call, parser_of
from narrows.cli.training import TrainingCLI, TrainingParser
from tests.hub.small_models import save_images, save_ours

# The shape checks of the test run wrap the functions whose signatures are read.
pytestmark = pytest.mark.compiled

FUNCTIONS: dict[str, dict[str, str]] = {
    **{name: {} for name in ("compare", "discover", "reduce", "export", "generate")},
    "show": {"several": "images"},
    "bench": {"first": "pattern"},
}
WORK = {
    "compare": "narrows.jobs.compare.train",
    "discover": "narrows.jobs.discover._train",
    "reduce": "narrows.jobs.reduce.run_trials",
    "export": "narrows.jobs.export.replacing_folder",
    "show": "narrows.jobs.show.overlay",
    "generate": "narrows.demo.reader.kept",
    "bench": "narrows.bench.runner.race",
}
BAD_OF_TYPE: dict[Any, tuple[str, ...]] = {
    int: ("many", "1.5", "", "0", "-1"),
    float: ("much", "", "0", "-1", "nan", "inf"),
    bool: ("maybe", "2"),
}
# What the type of a text does not say.
BAD_TEXTS: dict[str, tuple[str, ...]] = {
    "data": ("no/such/folder", "", "digts"),
    "models": (",", "vit_mni"),
    "device": ("tpu", "", "cuda:x"),
    "resume": ("no/such/run",),
    "start": ("no/such/model", ""),
    "model": ("vit_mni", "", "timm:vit_mni", "hf:no/such/folder"),
    "checkpoint": ("no/such/file.pth", ""),
    "checkpoint_key": ("model_ema",),
    "method": (",", "tpk", "ats,tpk"),
    "budget": (",", "0", "-0.5", "nan", "much", "3:0.7/x", "0.5/0.7"),
    "export": ("model.pt", ""),
    "lm": ("no/such/model",),
    "precision": ("7", ""),
    "backbone": ("timm:vit_mni", "no/such/folder"),
    "media": ("no/such/picture.png",),
    "images": ("no/such/picture.png", ""),
    "dtype": ("float33", ""),
    "modes": ("fast", "eager,fast"),
    "pattern": ("no/such/case", ""),
    **dict.fromkeys(("output", "save", "picture", "record"), ("FILE/inside",)),
}
FREE = {"prompt"}
"""Any text will do."""
ZERO_IS_GOOD = {"num_classes"}
UNNAMED = {"show": ("model", "images"), "bench": ("pattern",), "export": ("model", "output")}
"""Options that are given by their place alone, in this order."""
NEEDED = {
    "budget": ["--method", "topk"],
    "backbone": ["--model", "dinosaur"],
    "checkpoint_key": ["--checkpoint", "FILE"],
    "checkpoint": [],
    "media": ["--prompt", "x"],
}


def _function(command: str) -> tuple[Any, str, Callable[..., Any]]:
    module, name = (
        (runner, "run") if command == "bench" else (importlib.import_module(f"narrows.jobs.{command}"), command)
    )
    return module, name, getattr(module, name)


def _options(command: str) -> list[tuple[str, Any]]:
    """Names and types of a command's options."""
    _, _, function = _function(command)
    parser = parser_of(function, command, **FUNCTIONS[command])
    parameters = inspect.signature(function).parameters
    names = [action.dest for action in parser._actions if action.dest != "help"]
    assert set(names) == set(parameters), "an option for each argument, and none besides"
    return [(name, parameters[name].annotation) for name in names]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one."""
    return tuple(kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None))


def _bad() -> list[tuple[str, str, str]]:
    found = []
    for command in FUNCTIONS:
        for name, annotation in _options(command):
            kinds = () if get_origin(annotation) is Sequence else _kinds(annotation)
            (values,) = [BAD_OF_TYPE[kind] for kind in kinds if kind in BAD_OF_TYPE] or [BAD_TEXTS.get(name, ())]
            assert values or name in FREE, f"nothing is known to be bad for --{name} of {command}"
            found += [(command, name, value) for value in values if not (name in ZERO_IS_GOOD and value == "0")]
    return found


def test_every_command_is_tried() -> None:
    assert {*FUNCTIONS, "fit", "validate", "test", "predict", "info", "completion"} == set(COMMANDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images and a file."""
    root = tmp_path_factory.mktemp("place")
    save_ours(root / "model")
    save_images(root / "images")
    (root / "file").write_text("no weights")
    return root


def _line(command: str, place: Path, without: str = "") -> list[str]:
    """A command that would work."""
    model, images = str(place / "model"), str(place / "images")
    options: dict[str, str] = {
        "compare": {"data": images, "models": "vit_mini", "output": str(place / "runs")},
        "discover": {"output": str(place / "runs")},
        "reduce": {"model": model, "data": images, "method": "topk", "output": str(place / "runs")},
        "show": {"output": str(place / "runs")},
        "generate": {"output": str(place / "runs")},
        "bench": {},
        "export": {},
    }[command]
    places = {"model": model, "images": images, "pattern": "soft_moe/*", "output": str(place / "x.onnx")}
    unnamed = {name: places[name] for name in UNNAMED.get(command, ())}
    given = [word for name, value in options.items() if name != without for word in (f"--{name}", value)]
    return [command, *(value for name, value in unnamed.items() if name != without), *given]


@pytest.mark.parametrize(("command", "name", "value"), _bad())
def test_a_bad_value_is_an_error_in_words_before_any_work(
    command: str, name: str, value: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def worked(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(WORK[command], worked)
    value = value.replace("FILE", str(place / "file"))
    line, needed = _line(command, place, without=name), NEEDED.get(name, [])
    unnamed = UNNAMED.get(command, ())
    if name in unnamed:
        line.insert(1 + unnamed.index(name), value)
        given = line
    else:
        needed = [word.replace("FILE", str(place / "file")) for word in needed]
        needed = needed if name != "lm" else ["--checkpoint", str(place / "model"), "--prompt", "x"]
        needed = needed if (command, name) != ("generate", "checkpoint") else ["--lm", "no/such/lm", "--prompt", "x"]
        given = [*line, *needed, f"--{name}={value}"]
    assert main(given) in (1, 2)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("narrows"), printed
    assert len(printed) < 2500


@pytest.mark.parametrize("command", FUNCTIONS)
def test_a_good_value_of_every_option_arrives(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, job, function = _function(command)
    seen: dict[str, Any] = {}

    class Arrived(BaseException):
        """Ends the command once its arguments are there."""

    @functools.wraps(function)
    def record(*args: Any, **arguments: Any) -> None:
        seen.update(arguments)
        raise Arrived

    monkeypatch.setattr(module, job, record)
    unnamed = {"show": ["m", "a.png", "b.png"], "bench": ["*"], "export": ["m", "x.onnx"]}.get(command, [])
    good: dict[Any, dict[str, Any]] = {int: {"3": 3}, float: {"0.25": 0.25}, bool: {"true": True, "no": False}}
    for name, annotation in _options(command):
        if name in UNNAMED.get(command, ()):
            continue
        values: dict[str, Any] = {"x y": "x y"}
        if get_origin(annotation) is Sequence:
            values = {"a,b": ["a", "b"], '["a"]': ["a"]}
        else:
            values = next((good[kind] for kind in _kinds(annotation) if kind in good), values)
            values = {**values, **({"null": None} if type(None) in get_args(annotation) else {})}
        for text, value in values.items():
            for spelled in ([f"--{name}={text}"], [f"--{name.replace('_', '-')}", text]):
                with pytest.raises(Arrived):
                    main([command, *unnamed, *spelled])
                found = seen[name]
                assert (str(found) if isinstance(found, Path) else found) == value, spelled
    for name, annotation in _options(command):
        if annotation is bool:
            with pytest.raises(Arrived):
                main([command, *unnamed, f"--{name}"])
            assert seen[name] is True


@cache
def _training_parsers() -> dict[str, Any]:
    """The parsers of fit, validate, test and predict, for each task."""
    made = {}

    class Parsed(BaseException):
        """Ends the command once its parser is there."""

    class Only(TrainingCLI):
        def before_instantiate_classes(self) -> None:
            made[self.task] = self.parser
            raise Parsed

    for task in ("classification", "segmentation"):
        with pytest.raises(Parsed):
            Only(task, args=["fit"], parser_class=TrainingParser, auto_configure_optimizers=False)
    return {
        f"{task} {command}": sub
        for task, parser in made.items()
        for command, sub in parser._subcommands_action._name_parser_map.items()
    }


SIMPLE = {int: "1.5", float: "much", bool: "maybe"}


def test_every_option_of_training_refuses_what_is_not_of_its_type(capsys: Any) -> None:
    tried = 0
    parsers = _training_parsers()
    for command in ("classification fit", "segmentation fit"):
        for action in parsers[command]._actions:
            kinds = _kinds(getattr(action, "_typehint", None))
            if not action.option_strings or not kinds or not all(kind in SIMPLE for kind in kinds):
                continue
            with pytest.raises(SystemExit) as stop:
                parsers[command].parse_args([f"--{action.dest}=[what]"])
            assert stop.value.code == 2
            printed = capsys.readouterr().err
            assert action.dest in printed
            assert "Traceback" not in printed
            tried += 1
    assert tried > 60
    options = {
        name: {(a.dest, str(getattr(a, "_typehint", None))) for a in parser._actions}
        for name, parser in parsers.items()
    }
    for name, found in options.items():
        more = found - options[f"{name.partition(' ')[0]} fit"]
        assert {dest for dest, _ in more} <= {"verbose", "return_predictions"}, "as those of fit, which were tried"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("data.batch_size", value) for value in ("0", "-1")),
        ("data.image_size", "0"),
        ("data.num_workers", "-1"),
        *(("model.learning_rate", value) for value in ("0", "-1", "nan", "inf")),
        *(("model.weight_decay", value) for value in ("-1", "nan")),
        *(("model.warmup", value) for value in ("-0.1", "1.5", "nan")),
        *(("model.betas", value) for value in ("[0.9,1.0]", "[-1,0.9]")),
        *(("model.label_smoothing", value) for value in ("-0.1", "1.5", "nan")),
        ("model.model", "vit_mni"),
        ("model.model_args", '{"depht":1}'),
        ("trainer.accelerator", "abacus"),
        ("trainer.precision", "7"),
        ("trainer.max_epochs", "-7"),
        ("trainer.val_check_interval", "7.5"),
        ("checkpoint.save_top_k", "-7"),
        ("checkpoint.mode", "best"),
        ("checkpoint.every_n_train_steps", "-1"),
        ("ckpt_path", "no/such.ckpt"),
        ("task", "abacus"),
    ],
)
def test_a_value_of_training_that_is_out_of_range_is_an_error_in_words(
    option: str, value: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("the training began"))
    data = ["--data", str(place / "images"), "--data.image_size=16", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    assert main(["fit", *data, f"--{option}={value}"]) in (1, 2)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert any(line.startswith("narrows") for line in printed.splitlines()), printed


def _job(
    model: str, images: list[str], *, method: Sequence[str] = ("ats", "tome"), limit: int = 16, fast: bool = False
) -> None:
    """Do something.

    Args:
        model: its name.
        images: files, or folders
            of them.
        method: names.
        limit: at most 50% of them.
        fast: by default it is not.
    """


def test_help_speaks_of_no_types_of_python() -> None:
    shown = " ".join(parser_of(_job, "job", several="images").format_help().split())
    assert "type:" not in shown
    assert "required" not in shown
    assert "images files, or folders of them" in shown
    assert "names. (default: ats, tome)" in shown
    assert "at most 50% of them. (default: 16)" in shown


def test_a_name_for_what_has_none_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(_job, ["job", "--model", "vit", "a.png"], several="images")
    assert "That is written without a name: narrows job <model> <images>. See" in capsys.readouterr().err
