"""`narrows info`: what is installed and what can run here."""

import importlib
import pkgutil
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from textwrap import wrap

import torch

import narrows.ops
from narrows._version import __version__
from narrows.cli import EXTRAS, answer
from narrows.cli.parsing import ClearErrors
from narrows.models import list_models
from narrows.ops.dispatch import Implementation


def run(arguments: list[str]) -> None:
    """Print everything; needs no extra."""
    ClearErrors(prog="narrows info", description=__doc__).parse_args(arguments[1:])
    data = {
        "versions": versions(),
        "extras": {extra: {name: _version(name) for name in packages} for extra, packages in EXTRAS.items()},
        "devices": devices(),
        "models": list_models(),
        "object_models": list_models(task="objects"),
        "implementations": implementations(),
    }
    sections = {
        "Versions": data["versions"],
        "Extras": extras(),
        "Devices": data["devices"],
        "Models": dict.fromkeys(data["models"], ""),
        "Models that find objects": dict.fromkeys(data["object_models"], ""),
        "Implementations": data["implementations"],
    }
    answer("info", lambda: data, *(_section(title, entries) for title, entries in sections.items()))


def _section(title: str, entries: Mapping[str, str]) -> str:
    """Names and what is to be said of them, which stays in its column on 80 columns."""
    width = max(map(len, entries), default=0) + 4
    lines = [title]
    for name, text in entries.items():
        first = f"  {name:<{width - 2}}"
        lines += wrap(text, 80, initial_indent=first, subsequent_indent=" " * width) or [first.rstrip()]
    return "\n".join([*lines, ""])


def versions() -> dict[str, str]:
    """Versions of narrows, torch and Python."""
    return {"narrows": __version__, "torch": torch.__version__, "python": platform.python_version()}


def extras() -> dict[str, str]:
    """For each extra the packages that are installed, and how to install the others."""
    found = {}
    for extra, packages in EXTRAS.items():
        installed = {package: _version(package) for package in packages}
        missing = [package for package, number in installed.items() if number is None]
        there = ", ".join(f"{package} {number}" for package, number in installed.items() if number is not None)
        advice = f"missing: {', '.join(missing)} (pip install 'narrows[{extra}]')" if missing else ""
        found[extra] = "; ".join(filter(None, (there, advice)))
    return found


def devices() -> dict[str, str]:
    """The CPU and every accelerator torch can use."""
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def implementations() -> dict[str, str]:
    """For each operation and implementation what it does, or why it cannot run here."""
    return {
        f"{operation}.{name}": f"cannot run here: {reason}" if (reason := one.why_not()) else one.summary
        for operation, known in _operations()
        for name, one in known.items()
    }


def _operations() -> Iterator[tuple[str, Mapping[str, Implementation]]]:
    for package in pkgutil.iter_modules(narrows.ops.__path__):
        known = getattr(importlib.import_module(f"narrows.ops.{package.name}"), "IMPLEMENTATIONS", None)
        if known is not None:
            yield package.name, known


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
