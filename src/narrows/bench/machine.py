"""Where and with what a benchmark ran: the part of a row that no case decides."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from narrows import __version__


class Machine(NamedTuple):
    """What a timing cannot be understood without."""

    date: str
    hardware: str
    device: str
    cores: int
    threads: int
    narrows: str
    commit: str
    torch: str


def describe(device: torch.device) -> Machine:
    """The machine as it is now, with `device` doing the work."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        device=device.type,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        narrows=__version__,
        commit=_commit(),
        torch=torch.__version__,
    )


def settle_allocator() -> None:
    """Let the C library keep the memory that is freed, as it does in a process that has run for a while.

    glibc maps large blocks afresh, page fault by page fault, and hands free memory back. What is large, it learns from
    the blocks that were freed, up to 32 MiB. Otherwise the cases that ran before would decide the time of the next.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def rival_version(rival: nn.Module) -> str:
    """Name and version of the package that `rival` comes from, or whose modules it holds: "slot-attention 1.5.2"."""
    for module in rival.modules():
        package = type(module).__module__.partition(".")[0]
        if package in ("torch", "narrows", "builtins", "__main__"):
            continue
        for distribution in _distributions().get(package, ()):
            return f"{distribution.replace('_', '-')} {version(distribution)}"
    return f"torch {torch.__version__}"


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _processor() -> str:
    """Its name, on x86 its generation, and the widest vectors PyTorch uses.

    Clouds give processors one name that differ by a factor of two: "AMD EPYC" computes vectors of 512 bits at once from
    family 26 on, and in two halves before.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or platform.machine()
    generation = f"family {fields['cpu family']} model {fields['model']} " if "cpu family" in fields else ""
    return f"{name} {generation}{torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """The commit this source stands at, "+" after it where the source has changed since; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")  # not the rows that are being recorded
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    """What git says of the package's folder."""
    package = Path(__file__).parents[1]
    return subprocess.run(("git", *arguments), cwd=package, capture_output=True, text=True, check=True).stdout.strip()
