"""Options from signatures, and errors that name what was probably meant."""

import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin

from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter

from narrows.screen import tell

_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|(?:key|option) '([\w.]+)'", re.IGNORECASE)
_UNNAMED = re.compile(r"unrecognized arguments: ([^-\s]\S*)", re.IGNORECASE)
_UNIONS = (Union, UnionType)
_DENIED = re.compile(r"Importing '([^']*)' is not allowed")


USUAL_NAMES = {
    "lr": ("learning_rate",),
    "bs": ("batch_size",),
    "batch": ("batch_size",),
    "wd": ("model.weight_decay",),
    "size": ("image_size",),
    "img_size": ("image_size",),
    "max_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "seed": ("seeds",),
    "seeds": ("seed",),
    "ckpt": ("checkpoint",),
    "ckpt_path": ("checkpoint",),
    "weights": ("checkpoint",),
    "gpu": ("device",),
    "gpus": ("device",),
    "accelerator": ("device",),
    "dataset": ("data",),
    "input": ("data", "images"),
    "out": ("output",),
    "output_dir": ("output",),
    "methods": ("method",),
    "budgets": ("budget",),
    "text": ("prompt",),
    "max_tokens": ("max_new_tokens",),
}
"""What other programs call an option, and what it is called here."""


class PlainHelp(DefaultHelpFormatter):
    """Help without the types of Python, and with defaults as a shell has them."""

    def _get_help_string(self, action: Any) -> str:
        if action.default == SUPPRESS:
            return super()._get_help_string(action)
        default = ", ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
        said = default in (None, "", False) or "default" in (action.help or "")
        return action.help or "" if said else f"{action.help or ''} (default: {default})".lstrip()


class ClearErrors(ArgumentParser):
    """A parser that takes no abbreviations and whose complaint about an unknown option names the nearest one."""

    short: ClassVar[Mapping[str, str]] = {}
    """Further names of options, which become those of the parser before it reads them."""

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
        known += [name for name in self.short if name not in known]
        unnamed = {"predict": "images", "generate": "prompt"}.get(prog.split()[-1], "data")
        hint = _nearest(message, known, unnamed)
        unknown, places = _UNKNOWN.search(message), [a.dest for a in parser._actions if not a.option_strings]
        if unknown and unknown[1] in places:
            hint = f". That is written without a name: {prog} {' '.join(f'<{place}>' for place in places)}."
        tell(f"{prog}: {message}{hint} See `{prog} --help`.", "red")
        sys.exit(2)


def _nearest(message: str, known: Collection[str], unnamed: str) -> str:
    """Names the option that was probably meant where `message` complains about one that does not exist, or has none."""
    if stray := _UNNAMED.search(message):
        option = "model" if stray[1].startswith(("timm:", "hf:")) else unnamed
        value = "..." if option == "prompt" else stray[1]
        return f". Did you mean --{option} {value}?" if option in known else "."
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return "."
    name = unknown[1] or unknown[2]
    usual = [one for one in USUAL_NAMES.get(name, ()) if one in known]
    close = usual or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
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
    switches = {f"--{name}" for name, one in parameters.items() if one.annotation is bool}
    parser = parser_of(function, command, several=several, first=first)
    return function(**vars(parser.parse_args(with_lists(_switched(underscored(options), switches), lists_of(parser)))))


def parser_of(function: Callable[..., Any], command: str, *, several: str = "", first: str = "") -> ClearErrors:
    """The parser of the options that `call` calls `function` with."""
    summary = (function.__doc__ or "").partition("\n")[0]
    parser = ClearErrors(prog=f"narrows {command}", description=summary, formatter_class=PlainHelp)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={several, first})
    if first:
        default = inspect.signature(function).parameters[first].default
        parser.add_argument(first, nargs="?", default=default, help=_meaning(function, first))
    if several:
        parser.add_argument(several, nargs="+", help=_meaning(function, several))
    return parser


def _meaning(function: Callable[..., Any], name: str) -> str:
    """What the docstring says of an argument."""
    found = re.search(rf"^    {name}: (.+?)(?=\n    \w|\n\n|\Z)", inspect.getdoc(function) or "", re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def _switched(options: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--quick` as `--quick=true`, for the options in `switches` that are named without a value."""
    return [
        f"{option}=true" if option in switches and after.lower() not in ("true", "false", "yes", "no") else option
        for option, after in zip(options, [*options[1:], ""], strict=False)
    ]


def lists_of(parser: ArgumentParser) -> dict[str, bool]:
    """The options of a parser that take a list of plain things and nothing else; whether these are numbers."""
    found = {}
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) in _UNIONS else [hint]
        if len(kinds) == 1 and get_origin(kinds[0]) in (list, tuple, Sequence):
            items = {kind for one in get_args(kinds[0]) for kind in (get_args(one) or (one,)) if kind is not Ellipsis}
            if items <= {str, Path, int, float}:
                found |= dict.fromkeys(action.option_strings, items <= {int, float})
    return found


def with_lists(options: Sequence[str], listed: Mapping[str, bool]) -> list[str]:
    """`--models a,b` and `--models=a,b` as `--models=["a", "b"]`, for the options in `listed`; numbers unquoted."""
    found: list[str] = []
    for argument in options:
        if found and found[-1] in listed and not argument.startswith("--"):
            argument = f"{found.pop()}={argument}"
        option, given, value = argument.partition("=")
        if given and option in listed and not value.startswith("[") and value != "null":
            parts = [part.strip() for part in value.split(",") if part.strip()]
            argument = f"{option}=[{', '.join(parts)}]" if listed[option] else f"{option}={json.dumps(parts)}"
        found.append(argument)
    return found
