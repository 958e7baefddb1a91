"""Two processes of one training, started as `torchrun` starts them, on gloo."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from narrows.cli import main
from narrows.training.classification import Classification
from tests.data.folders import write_classes
from tests.processes import run_processes

# The processes are forked: shape checks add nothing but time.
pytestmark = pytest.mark.compiled

MODEL = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}


def _fit(folder: Path, *options: str, killed_at: int | None = None) -> list[int]:
    """The exit codes of both."""
    images = write_classes(folder / "images", {"cat": 16, "dog": 16})
    data = ["--data", str(images), "--data.image_size=16", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    arguments = ["fit", *data, "--model.model_args", json.dumps(MODEL), "--trainer.devices=2", "--trainer.strategy=ddp"]

    def process(rank: int) -> int:
        def die(task: Classification, *_: object) -> None:
            if rank == 1 and task.trainer.global_step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        if killed_at is not None:
            Classification.on_train_batch_start = die  # type: ignore[method-assign]
        code = main([*arguments, "--trainer.enable_progress_bar=false", *options])
        Path(f"left{rank}").write_text(str(not torch.distributed.is_initialized()))
        return code

    return run_processes(folder, process)


def test_a_killed_process_ends_all_with_one_line(tmp_path: Path) -> None:
    assert _fit(tmp_path, "--trainer.max_epochs=50", killed_at=5) == [1, -signal.SIGKILL]
    told = (tmp_path / "err0").read_text()
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if line.startswith("narrows: ")]
    assert len(lines) == 1, told
    ends = "narrows: Another process of this run is gone, and this one ends."
    said = rf"{ends} Go on with: narrows fit --config \S+ --checkpoint"
    assert re.match(said, lines[0])
    assert list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))


def test_under_torchrun_a_run_ends_and_leaves_its_group(tmp_path: Path) -> None:
    assert _fit(tmp_path, "--trainer.max_epochs=1") == [0, 0]
    assert [(tmp_path / f"left{rank}").read_text() for rank in range(2)] == ["True", "True"]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file()
