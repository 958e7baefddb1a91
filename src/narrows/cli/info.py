"""`narrows info`: what is installed and what can run here."""

import argparse
import importlib
import pkgutil
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

import narrows.ops
from narrows._version import __version__
from narrows.cli import EXTRAS
from narrows.models import list_models
from narrows.ops.dispatch import Implementation


def run(arguments: list[str]) -> None:
    """Print everything; needs no extra."""
    argparse.ArgumentParser(prog="narrows info", description=__doc__).parse_args(arguments[1:])
    sections = {
        "Versions": versions(),
        "Extras": extras(),
        "Devices": devices(),
        "Models": dict.fromkeys(list_models(), ""),
        "Models that find objects": dict.fromkeys(list_models(task="objects"), ""),
        "Implementations": implementations(),
    }
    for title, entries in sections.items():
        width = max(map(len, entries), default=0)
        print("\n".join([title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in entries.items()), ""]))


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
