"""`narrows completion`: a script by which a shell completes commands, options and their choices."""

import argparse
import importlib
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from narrows.cli import COMMANDS, SWITCHES
from narrows.cli.parsing import ClearErrors, parser_of
from narrows.errors import NarrowsError
from narrows.screen import say
from narrows.validation import check_choice


def run(arguments: list[str]) -> None:
    """Print the script; a command that needs an extra which is not there is left out."""
    try:
        shtab = importlib.import_module("shtab")
    except ImportError as error:
        raise NarrowsError("Completion needs shtab: pip install shtab") from error
    parser = ClearErrors(
        prog="narrows completion",
        description="Print a script for a shell, which completes commands and options. docs/commands.md says where to "
        "put it.",
    )
    parser.add_argument("shell", help=", ".join(shtab.SUPPORTED_SHELLS))
    shell = parser.parse_args(arguments[1:]).shell
    check_choice("shell", shell, tuple(shtab.SUPPORTED_SHELLS))
    print(shtab.complete(plain_parser(shtab.FILE), shell))


def plain_parser(file: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """One parser of all commands, without types: those of Lightning's trainer take minutes to look into.

    Args:
        file: how shtab marks what is completed by the names of files.
    """
    whole = argparse.ArgumentParser(prog="narrows")
    commands = whole.add_subparsers()
    for name, parser in _parsers().items():
        command = commands.add_parser(name, help=COMMANDS[name].summary)
        for switch, meaning in SWITCHES.items():
            command.add_argument(switch, action="store_true", help=meaning)
        for action in parser._actions:
            if action.dest == "help" or action.dest.endswith(".help"):
                continue
            kinds = [kind for kind in _kinds(getattr(action, "_typehint", None)) if kind is not NoneType]
            choices = [str(one) for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
            choices += ["true", "false"] if bool in kinds else list(action.choices or ())
            one: Any = command.add_argument(*action.option_strings or [action.dest], choices=choices or None)
            if file is not None and not choices and not {int, float} & set(kinds):
                one.complete = file
    return whole


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one."""
    return (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)


def _parsers() -> dict[str, Any]:
    """The parser of each command whose extra is there."""
    found: dict[str, Any] = {"info": argparse.ArgumentParser(), "completion": argparse.ArgumentParser()}
    for name, command in COMMANDS.items():
        if name in found:
            continue
        try:
            if name == "bench":
                found[name] = parser_of(importlib.import_module("narrows.bench.runner").run, name, first="pattern")
            elif command.place == "training.run":
                found |= importlib.import_module("narrows.cli.training").parsers()
            else:
                job = getattr(importlib.import_module(f"narrows.jobs.{name}"), name)
                found[name] = parser_of(job, name, several="images" if name == "show" else "")
        except ImportError as error:
            say(f"{name} is left out: {error}", "yellow")
    return {name: found[name] for name in COMMANDS if name in found}
