"""Several processes of one training, forked: what `torchrun` starts, without the time that new ones take to import."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only

TIMEOUT = 300


def run_processes(folder: Path, function: Callable[[int], int | None], *, count: int = 2) -> list[int]:
    """Run `function(rank)` in processes that take themselves for those of `torchrun`; their exit codes.

    Each works in `folder` and leaves there what it printed, as `out<rank>` and `err<rank>`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_process, args=(folder, function, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "it hangs"
    return [process.exitcode if process.exitcode is not None else -signal.SIGKILL for process in processes]


def _process(folder: Path, function: Callable[[int], int | None], rank: int, count: int, port: int) -> NoReturn:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in group.items()})
    rank_zero_only.rank = rank  # Lightning reads it from the environment where it is imported, which was before
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    code = 1
    try:
        code = function(rank) or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    os._exit(code)
