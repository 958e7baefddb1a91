import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from narrows.models import load_model
from narrows.training.callbacks import PredictionTable, SavePretrained
from tests.support import assert_close
from tests.training.small import small_data, small_task, small_trainer


def _logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def test_the_best_model_is_saved_and_opens_again(tmp_path):
    task, data = small_task(), small_data()
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", mode="max")  # the worst, so that it is not the last
    small_trainer(tmp_path, max_epochs=3, callbacks=[best, SavePretrained()], logger=_logger(tmp_path)).fit(task, data)
    saved = load_model(tmp_path / "model").state_dict()
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert set(saved) == set(task.model.state_dict())
    for name, value in saved.items():
        assert torch.equal(value, weights[f"model.{name}"])


def test_without_checkpoints_the_last_model_is_saved(tmp_path):
    task = small_task()
    options = {"callbacks": [SavePretrained()], "enable_checkpointing": False, "logger": _logger(tmp_path)}
    small_trainer(tmp_path, **options).fit(task, small_data())
    images, _ = small_data().loaded.held_out.batch([0, 1])
    assert_close(load_model(tmp_path / "model")(images), task.model.eval()(images), 0.0)


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_two_processes_write_the_table_that_one_writes(tmp_path):
    torch.manual_seed(0)
    task = small_task()
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
        data = small_data(batch_size=5)
        data.loaded.held_out._length = 23
        trainer = small_trainer(folder, callbacks=[PredictionTable()], logger=_logger(folder), **options)
        trainer.predict(task, data, return_predictions=False)
        tables.append(_rows(folder / "predictions.csv"))
    one, two = tables
    assert one[0] == ["image", "class", "probability"]
    assert [row[0] for row in one[1:]] == [f"scene {index}" for index in range(23)]
    with torch.no_grad():
        likely, label = task.eval()(small_data().loaded.held_out.batch(range(23))[0]).softmax(-1).max(-1)
    assert [int(row[1]) for row in one[1:]] == label.tolist()
    assert_close(torch.tensor([float(row[2]) for row in one[1:]]), likely, 1e-6)
    assert [row[:2] for row in two] == [row[:2] for row in one]
    assert_close(*(torch.tensor([float(row[2]) for row in table[1:]]) for table in tables), 1e-5)


def test_sharded_parameters_give_what_whole_ones_give_and_are_saved_whole(tmp_path):
    torch.manual_seed(0)
    task = small_task()
    small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(task, small_data(batch_size=8))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, "-m", "tests.training.sharded", str(tmp_path / "sharded")],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    saved = load_model(tmp_path / "sharded" / "model").state_dict()
    for name, value in task.model.state_dict().items():
        if name.endswith("attention.qkv.bias"):
            # The gradient of the keys' bias is 0 but for rounding, which Adam turns into steps of full length.
            (query, _, value), (saved_query, _, saved_value) = value.chunk(3), saved[name].chunk(3)
            assert_close(torch.cat((saved_query, saved_value)), torch.cat((query, value)), 1e-5)
        else:
            assert_close(saved[name], value, 1e-5)
