"""Options of `fit`, `validate`, `test` and `predict` as other commands spell them, and a help that fits a screen."""

import argparse
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from narrows.errors import InvalidArgument
from narrows.screen import say
from narrows.validation import check_choice
from narrows.weights import read_file

SHORT = {
    "data": "data.data",
    "model": "model.model",
    "epochs": "trainer.max_epochs",
    "batch_size": "data.batch_size",
    "image_size": "data.image_size",
    "learning_rate": "model.learning_rate",
    "precision": "trainer.precision",
    "seed": "seed_everything",
    "output": "trainer.default_root_dir",
    "checkpoint": "ckpt_path",
    "images": "data.images",
}
"""What Lightning calls the options that all commands share."""
FIRST = {
    "fit": ("data", "model", "task", "epochs", "batch_size", "image_size", "learning_rate", "precision", "device",
            "seed", "output", "checkpoint", "config"),
    "validate": ("checkpoint", "data", "batch_size", "device"),
    "test": ("checkpoint", "data", "batch_size", "device"),
    "predict": ("checkpoint", "images", "batch_size", "device", "output"),
}  # fmt: skip
"""The options of each command that people set first."""
TASK = "narrows_task"
"""Where a checkpoint has the name of its task."""
_FILES = (".yaml", ".yml", ".json")
# Where Lightning says nothing that helps.
_MEANINGS = {
    "epochs": "passes over the training images",
    "precision": '"bf16-mixed", "16-mixed", "32-true" and others of Lightning\'s trainer',
    "seed": "of weights, order and scenes",
    "output": 'folder of all runs, by default "runs"',
    "config": "a recipe, or the config.yaml of a run; options beside it go before it",
}
_CHECKPOINT_MEANINGS = {
    "fit": "a checkpoint to go on with, or the folder of its run",
    "predict": "the checkpoint that predicts, or the folder of its run; it knows model and classes",
}


def short_forms(arguments: Sequence[str]) -> list[str]:
    """`--data digits` for `--data.data digits`, `--epochs 3` for `--trainer.max_epochs 3`; files are configurations."""
    found = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, _, value = argument.partition("=")
        is_group = option in ("--data", "--model", "--checkpoint")
        if option[2:] in SHORT and option[:2] == "--" and not (is_group and Path(value or following).suffix in _FILES):
            argument = argument.replace(option, f"--{SHORT[option[2:]]}", 1)
        found.append(argument)
    return _with_found_checkpoint(found)


def _with_found_checkpoint(arguments: list[str]) -> list[str]:
    """The folder of a run as the checkpoint in it: the last to go on with, the best for all else."""
    place = next((at for at, word in enumerate(arguments) if word.partition("=")[0] == "--ckpt_path"), None)
    if place is None:
        return arguments
    name, given, value = arguments[place].partition("=")
    at = place if given else place + 1
    folder = Path(value if given else (arguments[at] if at < len(arguments) else ""))
    if not folder.name or not (folder / "checkpoints").is_dir():
        return arguments
    last = folder / "checkpoints" / "last.ckpt"
    others = [path for path in (folder / "checkpoints").glob("*.ckpt") if not path.stem.startswith("last")]
    chosen = others[0] if len(others) == 1 and arguments[0] != "fit" else last
    say(f"Checkpoint: {chosen}")
    arguments[at] = f"{name}={chosen}" if given else str(chosen)
    return arguments


def task_of(arguments: Sequence[str], choices: Sequence[str]) -> str:
    """The task that the options name, or the last configuration that does, or the checkpoint: it decides on options.

    Raises:
        InvalidArgument: no such task, or a configuration that is not YAML.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?")
    parser.add_argument("--ckpt_path", nargs="?")
    parser.add_argument("--config", "-c", nargs="?", action="append", default=[])
    given, _ = parser.parse_known_args(arguments)
    named = [given.task] if given.task else []
    for file in [Path(name) for name in reversed(given.config) if name and Path(name).is_file()]:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue  # the parser will complain of it
        except (ValueError, RecursionError, OSError) as error:
            got = f"{str(file)!r} ({str(error).partition(chr(10))[0]})"
            raise InvalidArgument("config", expected="a file in YAML", got=got) from error
        else:
            named += [content["task"]] if isinstance(content, dict) and "task" in content else []
    if not named and given.ckpt_path and Path(given.ckpt_path).is_file():
        named += [read_checkpoint(given.ckpt_path).get(TASK, "classification")]
    task = named[0] if named else "classification"
    check_choice("task", task, tuple(choices))
    return task


def read_checkpoint(path: str | Path) -> Any:
    """What is in a checkpoint.

    Raises:
        InvalidArgument: a file that is none.
    """
    try:
        return read_file(path)
    except InvalidArgument as error:
        got = str(error).partition("got ")[2].rstrip(".")
        raise InvalidArgument("checkpoint", expected="a checkpoint that narrows fit wrote", got=got) from error


def first_help(parser: Any, command: str, summary: str) -> str:
    """What people set first, as help that fits a screen.

    Args:
        parser: of the command, with every option there is.
        command: its name.
        summary: what it does.
    """
    shown = argparse.ArgumentParser(
        prog=f"narrows {command}",
        usage="%(prog)s [options]",
        description=f"{summary[:1].upper()}{summary[1:]}.",
        epilog=f"`narrows {command} --help-all` lists every option of data, model, trainer and checkpoints. Lists are "
        "written with commas. docs/training.md has examples.",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=18, width=80),
    )
    actions = {action.dest: action for action in parser._actions}
    meanings = {**_MEANINGS, "checkpoint": _CHECKPOINT_MEANINGS.get(command, "what is looked at, or its run's folder")}
    for name in FIRST[command]:
        action = actions[SHORT.get(name, name)]
        default = parser.get_defaults(skip_validation=True).get(action.dest)
        meaning = meanings.get(name) or re.sub(r" \(type: .*", "", action.help or "", flags=re.DOTALL)
        said = "default" in meaning or default in (None, "auto")
        text = meaning if said else f"{meaning.rstrip('.')} (default: {default})"
        shown.add_argument(f"--{name}", metavar="…", help=text.replace("%", "%%"))
    return shown.format_help()
