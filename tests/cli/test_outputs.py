"""Places that cannot be written are found before any work, by every command: one line, exit code 1."""

import errno
import json
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from narrows.cli import main
from tests.hub.small_models import save_images, save_ours

WORK = {
    "compare": "narrows.jobs.compare.train",
    "discover": "narrows.jobs.discover._train",
    "export": "narrows.jobs.export.write_program",
    "reduce": "narrows.jobs.reduce.run_trials",
    "reduce its own": "narrows.demo.vit.train",
    "show": "narrows.jobs.show.overlay",
    "generate": "narrows.demo.reader._trained",
    "bench": "narrows.bench.runner.race",
}


FULL = "FULL_DISK_IN_A_TEST"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, and a run."""
    root = tmp_path_factory.mktemp("place")
    save_ours(root / "model")
    images = save_images(root / "images")
    shape = ["--data", images, "--data.image_size=16", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    small = json.dumps({"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16})
    few = ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
    given = [*shape, *few, "--model.model_args", small, "--trainer.default_root_dir", str(root / "runs")]
    assert main(["fit", *given]) == 0
    return root


def _file(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_text("there before")


def _dangling(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.symlink_to(path.parent / "nowhere")


def _circle(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.symlink_to(path)


def _below_a_file(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.parent.rmdir()
    path.parent.write_text("there before")


def _refusing(number: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def refuse(path: Path, patch: pytest.MonkeyPatch) -> None:
        opened = os.open

        def open_(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT and str(name).startswith(str(path.parent)):
                raise OSError(number, os.strerror(number), str(name))
            return opened(name, flags, *args, **kwargs)

        patch.setattr(os, "open", open_)

    return refuse


def _full(path: Path, patch: pytest.MonkeyPatch) -> None:
    """No byte can be written by the command, though empty files can: as on a full disk."""
    patch.setenv(FULL, "1")


PLACES = {
    "a file": _file,
    "a dangling link": _dangling,
    "a circle of links": _circle,
    "below a file": _below_a_file,
    "read-only": _refusing(errno.EROFS),
    "not permitted": _refusing(errno.EACCES),
    "full": _full,
}


def _main(line: list[str]) -> int:
    """The command's code, on a disk that is full if a test says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if FULL in os.environ:  # only as long as the command runs: the test's own output may go to a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        return main(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _lines(place: Path, target: Path) -> dict[str, list[str]]:
    """By name, commands that write to `target`."""
    images, model = str(place / "images"), str(place / "model")
    compare = ["compare", "--data", images, "--models", "vit_mini", "--device", "cpu"]
    reduce = ["reduce", "--data", images, "--model", model, "--method", "topk", "--budget", "0.5", "--device", "cpu"]
    fit = ["fit", "--data", images, "--data.image_size=16", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    (last,) = place.glob("runs/*/checkpoints/last.ckpt")
    later = ["--ckpt_path", str(last), "--trainer.accelerator=cpu", "--trainer.default_root_dir", str(target)]
    return {
        "compare --output": [*compare, "--output", str(target)],
        "reduce --output": [*reduce, "--output", str(target)],
        "discover --output": ["discover", "--device", "cpu", "--output", str(target)],
        "export output": ["export", model, str(target), "--device", "cpu"],
        "reduce --save": [*reduce, "--output", str(place / "r"), "--save", str(target)],
        "reduce --export": [*reduce, "--output", str(place / "r"), "--export", str(target)],
        "show --output": ["show", model, images, "--output", str(target)],
        "generate --output": ["generate", "--output", str(target), "--device", "cpu"],
        "generate --picture": ["generate", "--output", str(place / "g"), "--picture", str(target), "--device", "cpu"],
        "bench --record": ["bench", "soft_moe/*", "--record", str(target)],
        "fit --trainer.default_root_dir": [*fit, "--trainer.default_root_dir", str(target)],
        "fit --checkpoint.dirpath": [
            *fit, "--trainer.default_root_dir", str(place / "f"), "--checkpoint.dirpath", str(target),
        ],
        **{f"{name} --trainer.default_root_dir": [name, *later] for name in ("validate", "test", "predict")},
    }  # fmt: skip


FILES = ("reduce --save", "reduce --export", "generate --picture", "export output")
"""What is written there is a file, and a folder is in its way; a link to nowhere is made a file."""
COMMANDS = (
    *("compare --output", "reduce --output", "discover --output", *FILES),
    *("show --output", "generate --output", "bench --record"),
    *("fit --trainer.default_root_dir", "fit --checkpoint.dirpath"),
    *(f"{name} --trainer.default_root_dir" for name in ("validate", "test", "predict")),
)


# Every command meets the usual ones; what is rare is found by the same check, so two commands meet it.
USUAL = ("a file", "a dangling link", "read-only", "full")
CASES = [
    *((command, kind) for command in COMMANDS for kind in USUAL if kind in ("a file", "full") or "root" not in command),
    *((command, kind) for command in COMMANDS[:2] for kind in PLACES if kind not in USUAL),
]


@pytest.mark.parametrize(("command", "kind"), CASES)
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    command: str, kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def worked(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr(logging, "raiseExceptions", False)  # logs of the test go to a file, on the disk that is full
    if command in (*FILES, "fit --checkpoint.dirpath") and kind == "a dangling link":
        pytest.skip("what it points to is made")
    (tmp_path / "in").mkdir()
    target = tmp_path / "in" / "out.onnx"
    line = _lines(place, target)[command]
    if command in FILES and kind == "a file":
        target.mkdir()
    else:
        PLACES[kind](target, monkeypatch)
    if command.startswith(("fit", "validate", "test", "predict")):
        for name in ("_run_stage", "_run_train"):
            if hasattr(Trainer, name):
                monkeypatch.setattr(Trainer, name, worked)
    else:
        monkeypatch.setattr(WORK[command.partition(" ")[0]], worked)
    before = sorted(tmp_path.rglob("*"))
    assert _main(line) == 1
    printed = capsys.readouterr().err
    told = [part for part in printed.splitlines() if part.startswith("narrows: ")]
    assert len(told) == 1, printed
    assert "Traceback" not in printed
    assert any(part in told[0] for part in ("out.onnx", str(tmp_path), str(place))), "the place is named"
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left"


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "full"])
def test_a_cache_that_cannot_be_written_is_found_before_the_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(WORK["reduce its own"], lambda *args, **kwargs: pytest.fail("the training began"))
    PLACES[kind](tmp_path / "cache" / "scenes_vit-56-pixels-10-epochs", monkeypatch)
    assert _main(["reduce", "--output", str(tmp_path / "runs"), "--device", "cpu"]) == 1
    told = [part for part in capsys.readouterr().err.splitlines() if part.startswith("narrows: ")]
    assert len(told) == 1
    assert "cannot be written" in told[0]
