"""Files are whole or not there: kills, full disks, permissions, links, folders and locks."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrows.errors import CannotWrite, InvalidArgument
from narrows.files import UNFINISHED, locked, new_folder, replacing, replacing_folder, write_text


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 4 KB: what the operating system says of a full disk, it says of this.

    Not for a whole test: what pytest prints may go to a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_new_file_has_the_permissions_of_the_umask_whoever_writes_it(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "a")
        with replacing(tmp_path / "deep" / "weights.safetensors") as unfinished:
            save_file({"a": torch.zeros(1)}, unfinished)
        with replacing_folder(tmp_path / "model") as unfinished:
            save_file({"a": torch.zeros(1)}, unfinished / "weights.safetensors")
    finally:
        os.umask(before)
    assert [_mode(path) for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [mode] * 3


def test_a_file_that_is_replaced_keeps_its_permissions_and_its_link(tmp_path):
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    write_text(file, "a")
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, "b")
    assert (file.read_text(), _mode(file), link.is_symlink()) == ("b", 0o640, True)
    assert [path.name for path in file.parent.iterdir()] == ["file"], "nothing unfinished stays"


def _fail_while_writing(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text("half")
        raise error


def _fail_in_a_folder(path: Path, error: type[BaseException]) -> None:
    with replacing_folder(path) as unfinished:
        (unfinished / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_goes_wrong_leaves_the_file_and_the_folder_of_before(tmp_path, error):
    write_text(tmp_path / "file", "before")
    for fail, place in (
        (_fail_while_writing, tmp_path / "file"),
        (_fail_in_a_folder, tmp_path),
        (_fail_in_a_folder, tmp_path / "new"),
    ):
        with pytest.raises(error):
            fail(place, error)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def _torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.zeros(5000)}, file)


WRITERS = {
    "text": lambda path: path.write_text("x" * 9000),
    "torch": _torch,
    "safetensors": lambda path: save_file({"a": torch.zeros(5000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_the_file_of_before(tmp_path, writer):
    write_text(tmp_path / "last.ckpt", "before")
    with full_disk(), pytest.raises(CannotWrite) as caught, replacing(tmp_path / "last.ckpt") as unfinished:
        WRITERS[writer](unfinished)
    said = f"{tmp_path / 'last.ckpt'} cannot be written: File too large. What was there before is unchanged."
    assert str(caught.value) == said
    full = pytest.raises(CannotWrite, match="File too large")
    with full_disk(), full, replacing_folder(tmp_path / "model") as unfinished:
        WRITERS[writer](unfinished / "weights")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("last.ckpt", "before")]


def test_places_that_cannot_be_written_are_named(tmp_path):
    write_text(tmp_path / "file", "before")
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x", "Not a directory|File exists")):
        with pytest.raises(CannotWrite, match=f"{path} cannot be written: ({reason})"):
            write_text(path, "x")
    with (
        pytest.raises(CannotWrite, match="file cannot be written: Not a directory"),
        replacing_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(CannotWrite, match=str(circle)):
        write_text(circle / "x", "x")
    with pytest.raises(InvalidArgument, match="output: expected a folder, got the file"):
        new_folder(tmp_path / "file")
    write_text("/dev/null", "what is no file is written to directly")
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    write_text(tmp_path / "model" / "notes", "mine")
    write_text(tmp_path / "model" / "config.json", "before")
    with replacing_folder(tmp_path / "model") as unfinished:
        (unfinished / "config.json").write_text("after")
        (unfinished / "encoder").mkdir()
        (unfinished / "encoder" / "config.json").write_text("inner")
        assert (tmp_path / "model" / "config.json").read_text() == "before"
    found = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"model/notes": "mine", "model/config.json": "after", "model/encoder/config.json": "inner"}


def test_what_a_killed_process_left_is_forgotten_after_an_hour(tmp_path):
    old, new = tmp_path / f"{UNFINISHED}old.ckpt", tmp_path / f"{UNFINISHED}new.ckpt"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    write_text(tmp_path / "file", "")
    assert {path.name for path in tmp_path.iterdir()} == {"file", new.name}


def _make_folder(parent: str, names) -> None:
    names.put(new_folder(parent).name)


def test_processes_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    context = multiprocessing.get_context("fork")
    names = context.SimpleQueue()
    processes = [context.Process(target=_make_folder, args=(str(tmp_path), names)) for _ in range(8)]
    for process in processes:
        process.start()
    found = {names.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 8
    assert {path.name for path in tmp_path.iterdir()} == found


HOLD = """
import sys, time
from narrows.files import locked
with locked(sys.argv[1]):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_waited_for_and_dies_with_its_process(tmp_path, capsys):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "inside\n"
    signal.signal(signal.SIGALRM, lambda *_: other.kill())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with locked(tmp_path / "cache", tell="waiting"):
        assert other.wait() == -signal.SIGKILL, "inside while the other was"
    assert capsys.readouterr().err == "waiting\n"
    with locked(tmp_path / "cache", tell="waiting"):
        pass
    assert capsys.readouterr().out == ""
