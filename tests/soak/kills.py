"""Kills a command again and again, and reads everything that it left: `python -m tests.soak.kills --folder <new>`.

Each round starts the command where the last one was killed, waits until it writes and for a random time after that,
kills it with SIGKILL, every tenth time with SIGTERM, and opens every file below its folder.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from narrows.files import UNFINISHED
from narrows.models import create_model, load_model
from tests.data.folders import write_classes

INTERVAL = 3
"""Steps between two checkpoints of `fit` here: an epoch."""

SMALL = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
SAVING = """
import sys, torch
from pathlib import Path
from narrows.models import create_model
model = create_model("vit_mini")
print("ready", flush=True)
while True:
    model.save_pretrained(sys.argv[1])
"""


@dataclass
class Found:
    """What the kills of a command left.

    Args:
        kills: how many there were.
        early: those of commands that had not written anything.
        unreadable: files that could not be read, and why.
        lost: the greatest number of training steps that a kill lost.
        unfinished: files and folders left half written, beside their targets.
    """

    kills: int = 0
    early: int = 0
    unreadable: list[str] = field(default_factory=list)
    lost: int = 0
    unfinished: int = 0


def read_everything(folder: Path) -> list[str]:
    """The files below a folder that cannot be read, and why."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or UNFINISHED in str(path) or path.suffix in (".lock", ".md"):
            continue
        try:
            _READERS.get(path.suffix, Path.read_bytes)(path)
            if path.name == "model.safetensors":
                load_model(path.parent)
        except Exception as error:
            wrong.append(f"{path}: {type(error).__name__}: {error}")
    return wrong


def _read_csv(path: Path) -> None:
    with path.open(newline="") as file:
        list(csv.reader(file))


def _read_checkpoint(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


_READERS: dict[str, Callable[[Path], object]] = {
    ".ckpt": _read_checkpoint,
    ".safetensors": load_file,
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.unsafe_load(path.read_text()),
    ".csv": _read_csv,
    ".html": lambda path: path.read_text().index("</html>"),
}


class Steps(Callback):
    """Writes the number of steps that are done into a file, after each.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Write it."""
        Path(self.path).write_bytes(b"%12d" % trainer.global_step)


def _changed(folder: Path) -> int:
    """When anything below a folder changed last, in nanoseconds."""
    times = [0]
    for place, folders, files in os.walk(folder):  # passes over what vanishes meanwhile
        for name in (*folders, *files):
            with suppress(OSError):
                times.append(os.stat(os.path.join(place, name)).st_mtime_ns)
    return max(times)


def kill_often(command: Callable[[], list[str]], folder: Path, *, kills: int, most: float, seed: int) -> Found:
    """Kill a command `kills` times, at most `most` seconds after it began to write into `folder`.

    Args:
        command: gives the arguments of the next start.
        folder: what it writes to.
        kills: how often.
        most: seconds.
        seed: of the moments.
    """
    found, moments = Found(), random.Random(seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NARROWS_IMPORTS": "tests"}
    for number in range(kills):
        with (folder.parent / "log.txt").open("ab") as log:
            arguments, before = command(), _changed(folder)
            process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
            deadline = time.monotonic() + 120
            while _changed(folder) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, most))
            found.early += _changed(folder) == before
            process.send_signal(signal.SIGTERM if number % 10 == 9 else signal.SIGKILL)
            process.wait()
        found.kills += 1
        found.unreadable += read_everything(folder)
        found.unfinished = sum(1 for path in folder.rglob(f"{UNFINISHED}*"))
    return found


def narrows(*arguments: object) -> list[str]:
    """A command of narrows in a process of its own."""
    return [sys.executable, "-c", "import sys; from narrows.cli import main; sys.exit(main())", *map(str, arguments)]


def kill_fit(folder: Path, kills: int, seed: int, most: float = 6.0) -> Found:
    """`narrows fit` with an interval of three steps, an epoch: each start goes on with the last checkpoint."""
    runs, counter, lost = folder / "runs", folder / "steps", [0]
    images = write_classes(folder / "images", {"cat": 16, "dog": 16})

    def command() -> list[str]:
        last = max(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
        if counter.exists():
            lost[0] = max(lost[0], int(counter.read_bytes() or 0) - (_read_checkpoint(last) if last else 0))
            counter.unlink()
        options = ["--data", images, "--data.image_size", 16, "--data.batch_size", 8, "--trainer.max_epochs", 10_000]
        options += ["--trainer.default_root_dir", runs, "--trainer.enable_progress_bar=false", "--trainer.devices=1"]
        options += ["--trainer.callbacks+=tests.soak.kills.Steps", f"--trainer.callbacks.path={counter}"]
        resume = ["--ckpt_path", last] if last is not None else ["--model.model_args", json.dumps(SMALL)]
        return narrows("fit", *options, "--trainer.accelerator", "cpu", *resume)

    found = kill_often(command, runs, kills=kills, most=most, seed=seed)
    found.lost = lost[0]
    return found


def kill_compare(folder: Path, kills: int, seed: int, most: float = 6.0) -> Found:
    """`narrows compare --resume`: what is finished stays finished."""
    runs = folder / "runs"
    images = write_classes(folder / "images", {"cat": 16, "dog": 16})

    def command() -> list[str]:
        begun = next(runs.glob("*/settings.json"), None)
        if begun is not None:
            return narrows("compare", "--resume", begun.parent, "--device", "cpu")
        options = ["--data", images, "--image_size", 16, "--batch_size", 8, "--epochs", 300, "--seeds", 9]
        return narrows("compare", *options, "--models", "vit_mini", "--output", runs, "--device", "cpu")

    return kill_often(command, runs, kills=kills, most=most, seed=seed)


def kill_reduce(folder: Path, kills: int, seed: int, most: float = 6.0) -> Found:
    """`narrows reduce`: reports, reductions and ONNX files; an earlier one stays whole."""
    weights = folder / "model"
    create_model("vit_mini", **SMALL | {"depth": 2, "image_size": 16, "channels": 3}).save_pretrained(weights)
    images = write_classes(folder / "images", {"cat": 4, "dog": 4})
    runs = folder / "runs"
    options = ["--data", images, "--method", "topk", "--budget", "0.5", "--output", runs, "--device", "cpu"]
    options += ["--save", runs / "reduction.json"]
    command = narrows("reduce", "--model", weights, *options)
    return kill_often(lambda: command, runs, kills=kills, most=most, seed=seed)


def kill_saving(folder: Path, kills: int, seed: int, most: float = 2.0) -> Found:
    """`save_pretrained` into one folder without end."""
    model = folder / "models" / "model"
    command = [sys.executable, "-c", SAVING, str(model)]
    return kill_often(lambda: command, model.parent, kills=kills, most=most, seed=seed)


KINDS = {"saving": kill_saving, "fit": kill_fit, "compare": kill_compare, "reduce": kill_reduce}


def main() -> int:
    """Kill, and print a row for each kind; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--most", type=float, help="seconds after which a command is killed at the latest")
    asked = parser.parse_args()
    failed = 0
    for kind in asked.kinds:
        folder = asked.folder / kind
        (folder / "runs").mkdir(parents=True)
        (folder / "models").mkdir()
        most = {} if asked.most is None else {"most": asked.most}
        found = KINDS[kind](folder, asked.kills, asked.seed, **most)
        failed += len(found.unreadable) + (found.lost > INTERVAL)
        print(
            f"{kind}: {found.kills} kills, {found.early} of them too early; unreadable {len(found.unreadable)}; steps "
            f"lost by a kill, at most {found.lost}; left half written beside their targets {found.unfinished}",
            *found.unreadable,
            sep="\n  ",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
