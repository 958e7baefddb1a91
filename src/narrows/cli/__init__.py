"""The shell's face of narrows. A command is thin: it calls one public function that does the same from Python."""

import difflib
import importlib
import json
import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from textwrap import wrap
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from narrows._version import __version__
from narrows.errors import NarrowsError, Terminated
from narrows.screen import quiet, tell

if TYPE_CHECKING:
    from narrows.visualize.tables import ScreenTable


class Command(NamedTuple):
    """A command: the function that does it, as `module.function` of this room, and a line for the help."""

    place: str
    summary: str


COMMANDS = {
    "compare": Command(
        "commands.compare", "train a baseline and every mechanism under one budget; report what each costs and keeps"
    ),
    "show": Command("commands.show", "draw where the tokens of images go in a model"),
    "reduce": Command("commands.reduce", "let a vision transformer carry fewer tokens; report what it costs and keeps"),
    "discover": Command(
        "commands.discover", "find objects in images without labels; report how well where masks are known"
    ),
    "export": Command("commands.export", "write a model, reduced or not, as ONNX or for torch.export; check it"),
    "info": Command("info.run", "say what is installed, which models there are and what can run here"),
    "fit": Command("training.run", "train one model, with checkpoints and exact resume"),
    "validate": Command("training.run", "loss and accuracy on the held-out images"),
    "test": Command("training.run", "loss and accuracy on the test images"),
    "predict": Command("training.run", "class and probability of images, as a table"),
    "generate": Command("commands.generate", "let a language model write after a prompt with pictures"),
    "bench": Command("commands.bench", "time narrows against the packages people use today"),
    "completion": Command("completion.run", "print a script by which bash, zsh or tcsh completes commands and options"),
}

_GROUPS = {
    "Which mechanism is for me?": ("compare", "show"),
    "How fast can a model you have be?": ("reduce", "export"),
    "Where are the objects?": ("discover",),
    "Train one": ("fit", "validate", "test", "predict"),
    "Let a language model see": ("generate",),
    "How fast, and what is here?": ("bench", "info", "completion"),
}


EXTRAS: dict[str, dict[str, str]] = {
    "timm": {"timm": "timm"},
    "transformers": {"transformers": "transformers"},
    "viz": {"matplotlib": "matplotlib", "pillow": "PIL"},
    "train": {
        "lightning": "lightning",
        "torchmetrics": "torchmetrics",
        "tensorboard": "tensorboard",
        "torchvision": "torchvision",
        "scikit-learn": "sklearn",
        "scipy": "scipy",
    },
    "onnx": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "gguf": {"gguf": "gguf"},
    "datasets": {"datasets": "datasets"},
    "objects": {"pycocotools": "pycocotools", "tfrecord": "tfrecord"},
    "scenes": {"pybullet": "pybullet"},
}
"""The packages that each extra brings, and as what they are imported."""

SWITCHES = {
    "--quiet": "no notes and no progress, only results and errors",
    "--json": "print the result as JSON",
    "--debug": "show where an error came from (or NARROWS_DEBUG=1)",
}
"""What every command takes, anywhere in its line."""

JSON: ContextVar[bool] = ContextVar("json", default=False)
"""Whether results are printed as JSON."""

_SCREEN = 1200
"""Characters of a message: fifteen lines of 80."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `narrows <arguments>` and return its exit code.

    0 is success, 1 an error narrows explains, 2 a command or option that does not exist; 130 Ctrl-C, 143 SIGTERM, 129
    SIGHUP, 141 a reader of the output that went away (`| head`): the number of the signal and 128.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("NARROWS_DEBUG"))
    as_json = JSON.set("--json" in given)
    try:
        with _signals_raise(), quiet("--quiet" in given):
            code = _run([argument for argument in given if argument not in SWITCHES])
            return 141 if _nobody_reads() else code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        told = _told(error)
        if debug or told is None:
            raise
        tell(f"narrows: {_on_a_screen(told)}", "red")
        return 1
    except KeyboardInterrupt as interrupt:
        tell(f"\nnarrows: stopped. {interrupt}".rstrip(), "yellow")
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    except SystemExit as stop:
        if _nobody_reads():
            return 141
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        JSON.reset(as_json)


def _nobody_reads() -> bool:
    """Whether the reader of our output went away, as `head` does; what is left of it is dropped then."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    try:
        place, pipe = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # no pipe of a system with polls
        return False
    pipe.register(place, 0)
    gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), place)
    return gone


def answer(command: str, data: Callable[[], Mapping[str, Any]], *shown: "str | ScreenTable") -> None:
    """Print what a command found: what is `shown`, or with `--json` an object of `data`, "command" and "narrows"."""
    if JSON.get():
        print(json.dumps(_plain({"command": command, "narrows": __version__, **data()}), indent=2, allow_nan=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for each in shown:
        if not isinstance(each, str):
            each.print(console)
        elif console.is_terminal:
            console.print(Text(each))
        else:
            print(each)


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is no number is null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def _told(error: Exception) -> str | None:
    """What to say of an error that is no fault of narrows; None of one that is."""
    if isinstance(error, NarrowsError):
        return str(error)
    if isinstance(error, ImportError):
        missing = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if missing in packages.values():
                return f"This needs {missing}: pip install 'narrows[{extra}]'"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'A file or a connection'}: {os.strerror(error.errno)}."
    # Not imported for this: it is loaded where it was raised.
    if type(error).__name__ == "SafetensorError":
        return f"A file of weights cannot be read or written: {str(error).partition(chr(10))[0]}."
    return None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated` inside, as Ctrl-C raises `KeyboardInterrupt`; `nohup` keeps its word."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise Terminated(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_a_screen(message: str) -> str:
    """A message in a few lines, without the control characters that names in files may have."""
    shown = "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in message)
    return shown if len(shown) <= _SCREEN else f"{shown[: _SCREEN - 60]} ... (--debug shows all of it)"


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"narrows {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(COMMANDS)}."
        tell(f"narrows: unknown command {name!r}. {hint} See `narrows --help`.", "red")
        return 2
    module, _, function = COMMANDS[name].place.partition(".")
    getattr(importlib.import_module(f"narrows.cli.{module}"), function)([name, *rest])
    return 0


def _help() -> str:
    lines = [f"narrows {__version__}: token bottlenecks for PyTorch", "", "usage: narrows <command> [options]"]
    for title, names in _GROUPS.items():
        lines += ["", title]
        for name in names:
            lines += wrap(COMMANDS[name].summary, 80, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
    lines += [
        "",
        "Every command takes",
        *(f"  {name:<12}{meaning}" for name, meaning in SWITCHES.items()),
        "",
        "`narrows help <command>` lists the options of a command; words in them may be",
        "joined by - or _. -V, --version prints the version.",
        "",
        "Start here: narrows compare",
    ]
    return "\n".join(lines)
