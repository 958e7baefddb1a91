"""Where a job runs, and where it leaves what it found."""

import platform
import time
from itertools import count
from pathlib import Path

import torch

from narrows._version import __version__
from narrows.errors import InvalidArgument


def accelerator_of(device: str) -> str:
    """The accelerator that "auto", "cpu" or "cuda" names here: "cpu" or "cuda".

    Raises:
        InvalidArgument: another device, or CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidArgument("device", expected="'auto', 'cpu' or 'cuda'", got=repr(device))
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device", expected="'cpu' or 'auto' on a machine without CUDA", got="'cuda'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def new_folder(output: Path) -> Path:
    """A new folder in `output`, named by the time.

    Raises:
        InvalidArgument: `output` is a file.
    """
    if output.is_file():
        raise InvalidArgument("output", expected="a folder", got=f"the file {str(output)!r}")
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in count():
        folder = output / (f"{stamp}_{attempt}" if attempt else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def machine() -> str:
    """What a speed was measured on, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}, narrows {__version__}"
