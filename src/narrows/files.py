"""How narrows writes files and folders: whole or not at all, whatever happens in between.

A file is written beside its target, synced to the disk and renamed. A process that is killed, or a disk that is full,
leaves the file that was there before. Files have the permissions that the umask of the process asks for.
"""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from narrows.errors import CannotWrite, InvalidArgument
from narrows.screen import say

UNFINISHED = ".unfinished-"
"""How the names of files and folders begin that are being written."""

_LEFT_BEHIND = 3600
"""Seconds after which what is unfinished is taken for that of a process that was killed."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The name of a new file beside `path`, which becomes `path` at the end unless something went wrong.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, replacing(Path(folder) / "notes.txt") as unfinished:
    ...     unfinished.write_text("whole or not at all")
    19

    A link stays a link: what it points to is replaced. What is no file, such as `/dev/stdout`, is written to directly.

    Raises:
        CannotWrite: the folder or the disk refuses; the file that was there is as it was.
    """
    path = Path(path)
    try:
        target = path.resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        is_file = target.is_file() or not target.exists()
        unfinished, mode = _fresh_file(target) if is_file else (target, 0)
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError before Python 3.13
        raise CannotWrite(path, _reason(error)) from error
    try:
        yield unfinished
        if is_file:
            _sync(unfinished)
            unfinished.chmod(mode)
            unfinished.replace(target)
            _sync(target.parent)
    except BaseException as error:
        if is_file:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        if (reason := _disk_error(error)) is not None:
            raise CannotWrite(path, reason) from error
        raise


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder, whose files are in `folder` at the end unless something went wrong.

    Where there is no `folder` yet, it appears in one step. Otherwise its files are replaced one by one, all of them
    written before the first is, and others that are there stay.

    Raises:
        CannotWrite: the folder or the disk refuses; what was there is as it was.
    """
    folder = Path(folder)
    try:
        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        unfinished = _beside(target / "x" if target.is_dir() else target)
        unfinished.mkdir()
    except (OSError, RuntimeError) as error:
        raise CannotWrite(folder, _reason(error)) from error
    try:
        yield unfinished
        probe, mode = _fresh_file(unfinished / "probe")
        probe.unlink()
        written = sorted(path for path in unfinished.rglob("*") if path.is_file())
        for path in written:
            path.chmod(mode)
            _sync(path)
        if not target.exists():
            unfinished.rename(target)
            _sync(target.parent)
            return
        for path in written:
            place = target / path.relative_to(unfinished)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        _sync(target)
    except BaseException as error:
        if (reason := _disk_error(error)) is not None:
            raise CannotWrite(folder, reason) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8.

    Raises:
        CannotWrite: the folder or the disk refuses; the file that was there is as it was.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise, before any work is done, unless a file could be written there, or a folder with files in it.

    Raises:
        CannotWrite: a folder where a file should be or the other way round, no permission, no space, a link that leads
            nowhere where a folder should be.
    """
    path = Path(path)
    try:
        target = path.resolve()
        if target.exists() and target.is_dir() != folder:
            number = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(number, os.strerror(number))
        if folder and path.is_symlink() and not target.exists():
            raise FileNotFoundError(errno.ENOENT, f"a link to {target}, which does not exist")
        there = next(place for place in (target, *target.parents) if place.exists())
        if there != target and not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _probe(there if there.is_dir() else there.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise CannotWrite(path, _reason(error)) from error


def new_folder(parent: str | Path) -> Path:
    """A new folder in `parent`, named by the time, that no other process gets.

    Raises:
        InvalidArgument: `parent` is a file.
        CannotWrite: no folder can be made there.
    """
    parent = Path(parent)
    if parent.exists() and not parent.is_dir():
        raise InvalidArgument("output", expected="a folder", got=f"the file {str(parent)!r}")
    check_writable(parent, folder=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in count():
            folder = parent / (f"{stamp}_{attempt}" if attempt else stamp)
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise CannotWrite(parent, _reason(error)) from error
    raise AssertionError


@contextmanager
def locked(path: str | Path, tell: str = "") -> Iterator[None]:
    """Only one process at a time is inside; others wait. A process that dies lets go.

    Args:
        path: what is locked; a file `<path>.lock` beside it stands for it.
        tell: what is said if another process is inside.

    Raises:
        CannotWrite: no lock can be made there.
    """
    from filelock import FileLock, Timeout

    file = Path(f"{path}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if tell:
                say(tell)
            lock.acquire()
    except OSError as error:
        raise CannotWrite(file, _reason(error)) from error
    try:
        yield
    finally:
        lock.release()


def _beside(target: Path) -> Path:
    """A new name beside `target`. What processes that were killed had not finished there is removed."""
    for path in target.parent.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return target.parent / f"{UNFINISHED}{secrets.token_hex(8)}{target.suffix}"


def _fresh_file(target: Path) -> tuple[Path, int]:
    """An empty file beside `target`, and the permissions for it: those of the old file, or else of the umask."""
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    path = _beside(target)
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(handle).st_mode
    finally:
        os.close(handle)
    return path, (target.stat().st_mode if target.exists() else mode) & 0o7777


def _probe(folder: Path) -> None:
    """Write a block of bytes into a folder, and remove it again: a disk that is full still takes empty files."""
    probe, _ = _fresh_file(folder / "probe")
    try:
        probe.write_bytes(bytes(4096))
        _sync(probe)
    finally:
        probe.unlink()


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system syncs folders
            raise
    finally:
        os.close(handle)


def _disk_error(error: BaseException) -> str | None:
    """What the operating system refused, if that is behind `error`: torch and safetensors hide it in their own ways."""
    if isinstance(error, CannotWrite) or not isinstance(error, Exception):
        return None
    for found in (error, error.__cause__, error.__context__):
        if isinstance(found, OSError):
            return _reason(found)
    number = _OS_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
