"""Options from signatures, and errors that name what was probably meant."""

import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn, get_origin

from jsonargparse import ArgumentParser

_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|(?:key|option) '([\w.]+)'", re.IGNORECASE)
_DENIED = re.compile(r"Importing '([^']*)' is not allowed")


class ClearErrors(ArgumentParser):
    """A parser that takes no abbreviations and whose complaint about an unknown option names the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Complain in a line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        if denied := _DENIED.search(message):
            message = (
                f"a configuration may not import {denied[1]}. If you trust it, name its package in the environment: "
                f"NARROWS_IMPORTS={denied[1].partition('.')[0]}"
            )
        message = " ".join(message.split())
        known = [name[2:] for name in parser._option_string_actions if name.startswith("--")]
        print(f"{prog}: {message}{_nearest(message, known)} See `{prog} --help`.", file=sys.stderr)
        sys.exit(2)


def _nearest(message: str, known: Iterable[str]) -> str:
    """Names the option that was probably meant where `message` complains about one that does not exist."""
    unknown = _UNKNOWN.search(message)
    close = difflib.get_close_matches(unknown[1] or unknown[2], known, n=1, cutoff=0.5) if unknown else []
    return f". Did you mean --{close[0]}?" if close else "."


def underscored(arguments: Iterable[str]) -> list[str]:
    """`--image-size=3` as `--image_size=3`: options are spelled like the arguments of the functions they call."""
    return [re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), a) for a in arguments]


def call(function: Callable[..., Any], arguments: list[str], *, several: str = "", first: str = "") -> Any:
    """Call `function` with the options in `arguments[1:]`, and return what it returns; `arguments[0]` is the command.

    Arguments without a default have no option name. The one called `several` takes one value or more and comes last;
    the one called `first` has a default and no option name either. Sequences are written with commas: `--models a,b`;
    what is True or False may be named alone: `--quick`.
    """
    command, *options = arguments
    parameters = inspect.signature(function).parameters
    listed = {f"--{name}" for name, one in parameters.items() if get_origin(one.annotation) is Sequence}
    switches = {f"--{name}" for name, one in parameters.items() if one.annotation is bool}
    parser = parser_of(function, command, several=several, first=first)
    return function(**vars(parser.parse_args(_with_lists(_switched(underscored(options), switches), listed))))


def parser_of(function: Callable[..., Any], command: str, *, several: str = "", first: str = "") -> ClearErrors:
    """The parser of the options that `call` calls `function` with."""
    parser = ClearErrors(prog=f"narrows {command}", description=(function.__doc__ or "").partition("\n")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={several, first})
    if first:
        parser.add_argument(first, nargs="?", default=inspect.signature(function).parameters[first].default)
    if several:
        parser.add_argument(several, nargs="+")
    return parser


def _switched(options: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--quick` as `--quick=true`, for the options in `switches` that are named without a value."""
    return [
        f"{option}=true" if option in switches and after.lower() not in ("true", "false", "yes", "no") else option
        for option, after in zip(options, [*options[1:], ""], strict=False)
    ]


def _with_lists(options: Sequence[str], listed: Collection[str]) -> list[str]:
    """`--models a,b` and `--models=a,b` as `--models=["a", "b"]`, for the options in `listed`."""
    found: list[str] = []
    for argument in options:
        if found and found[-1] in listed and not argument.startswith("--"):
            argument = f"{found.pop()}={argument}"
        option, given, value = argument.partition("=")
        if given and option in listed and not value.startswith("["):
            argument = f"{option}={json.dumps([part.strip() for part in value.split(',') if part.strip()])}"
        found.append(argument)
    return found
