"""What is trained once and kept: by one process at a time, and anew where what was kept is damaged."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from narrows.errors import MissingExtra, NarrowsError
from narrows.files import check_writable, locked
from narrows.screen import say

DAMAGE = (NarrowsError, SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError)
"""What opening a damaged folder raises: JSON that is cut, weights that are missing or others."""

Found = TypeVar("Found")


def kept(folder: Path, make: Callable[[], None], read: Callable[[], Found]) -> Found:
    """What `read` finds in `folder`; `make` writes the folder where it is not there.

    A folder that cannot be read is named, set aside, and made anew. Where another process makes it, this one waits.

    Args:
        folder: what is kept.
        make: writes it, whole or not at all.
        read: opens it, and raises where it is damaged.
    """
    if folder.is_dir():
        with suppress(*DAMAGE):
            return read()
    with locked(folder, tell=f"Waiting for another process that makes {folder}"):
        if folder.is_dir():
            try:
                return read()
            except DAMAGE as error:
                if isinstance(error, (MissingExtra, PermissionError)):
                    raise
                names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in count())
                aside = next(name for name in names if not name.exists())
                folder.rename(aside)
                complaint = str(error).partition("\n")[0]
                say(f"{folder} is damaged ({complaint}). It is now {aside.name}, and is made anew.")
        check_writable(folder, folder=True)
        make()
        return read()
