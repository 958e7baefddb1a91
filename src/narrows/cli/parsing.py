"""Options from signatures, and errors that name what was probably meant."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from narrows.errors import MissingExtra

try:
    from jsonargparse import ArgumentParser
except ImportError as error:
    raise MissingExtra("jsonargparse", extra="train", purpose="read the options of this command") from error

_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|(?:key|option) '([\w.]+)'", re.IGNORECASE)


class ClearErrors(ArgumentParser):
    """A parser that takes no abbreviations and whose complaint about an unknown option names the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Complain in a line or two and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
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


def call(function: Callable[..., Any], arguments: list[str], *, several: str = "", first: str = "") -> None:
    """Call `function` with the options in `arguments[1:]`; `arguments[0]` is the command.

    Arguments without a default have no option name. The one called `several` takes one value or more and comes last;
    the one called `first` has a default and no option name either.
    """
    command, *options = arguments
    parser = ClearErrors(prog=f"narrows {command}", description=(function.__doc__ or "").partition("\n")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={several, first})
    if first:
        default = inspect.signature(function).parameters[first].default
        parser.add_argument(first, nargs="?", default=default, help=f"(default: {default})")
    if several:
        parser.add_argument(several, nargs="+")
    function(**vars(parser.parse_args(underscored(options))))
