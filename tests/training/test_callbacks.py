"""What runs leave behind: the best model, tables, maps of classes, and a model reduced while it trains."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

import narrows
from narrows.cli import main
from narrows.data.module import SegmentationDataModule
from narrows.models import load_model
from narrows.training.callbacks import ClassMaps, PredictionTable, ReduceTokens, SavePretrained
from narrows.training.segmentation import Segmentation
from tests.data.folders import write_image
from tests.hub.small_models import SHAPE
from tests.processes import run_processes
from tests.support import assert_close
from tests.training import sharded
from tests.training.small import small_data, small_task, small_trainer

SIZES = {"num_classes": 10, "image_size": 16, "channels": 1}


def _logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def test_the_best_model_is_saved_and_opens_again(tmp_path):
    task, data = small_task(), small_data()
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", mode="max")  # the worst, so that it is not the last
    small_trainer(tmp_path, max_epochs=3, callbacks=[best, SavePretrained()], logger=_logger(tmp_path)).fit(task, data)
    saved = load_model(tmp_path / "model").state_dict()
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert set(saved) == set(task.model.state_dict())
    assert any(not torch.equal(value, saved[name]) for name, value in task.model.state_dict().items()), (
        "is left as it is"
    )
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
    assert run_processes(tmp_path, lambda _: sharded.main(tmp_path / "sharded")) == [0, 0]
    saved = load_model(tmp_path / "sharded" / "model").state_dict()
    for name, value in task.model.state_dict().items():
        if name.endswith("attention.qkv.bias"):
            # The gradient of the keys' bias is 0 but for rounding, which Adam turns into steps of full length.
            (query, _, value), (saved_query, _, saved_value) = value.chunk(3), saved[name].chunk(3)
            assert_close(torch.cat((saved_query, saved_value)), torch.cat((query, value)), 1e-5)
        else:
            assert_close(saved[name], value, 1e-5)


def _predict(folder, processes: int = 1, **kwargs) -> ClassMaps:
    """A segmenter that answers by brightness, on seven held-out scenes or the images given."""
    model = torch.nn.Conv2d(1, 11, 1)
    torch.nn.init.zeros_(model.weight)
    model.weight.data[3], model.bias.data[:] = 1.0, 0.5
    data = SegmentationDataModule(image_size=32, batch_size=3, **kwargs)
    data.loaded.held_out._length = 7
    writer = ClassMaps()
    options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    trainer = small_trainer(folder, callbacks=[writer], logger=_logger(folder), **options)
    trainer.predict(Segmentation(model), data, return_predictions=False)
    return writer


def test_maps_hold_the_predicted_classes_and_a_palette(tmp_path):
    _predict(tmp_path)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == [f"{index:05}_scene {index}.png" for index in range(7)]
    images, _ = SegmentationDataModule(image_size=32).loaded.held_out.batch([6])
    with Image.open(files[6]) as written:
        assert written.mode == "P"
        bright = np.asarray(written)
        colours = np.asarray(written.convert("RGB"))
    expected = torch.where(images[0, 0] > 0, 3, 0)
    assert np.array_equal(bright, expected)
    assert len(np.unique(colours[bright == 3], axis=0)) == 1
    assert (colours[bright == 0] == 0).all()


def test_the_picture_shows_the_truth_where_it_is_known(tmp_path):
    _predict(tmp_path / "known")
    image = write_image(tmp_path / "new" / "x.jpg", size=(50, 30))
    _predict(tmp_path / "unknown", images=[str(image)])
    assert [file.name for file in (tmp_path / "unknown" / "predictions").iterdir()] == ["00000_x.png"]
    known, unknown = (Image.open(tmp_path / name / "predictions.png") for name in ("known", "unknown"))
    assert known.height > 1.2 * unknown.height


def test_two_processes_write_the_maps_that_one_writes(tmp_path):
    for processes in (1, 2):
        _predict(tmp_path / str(processes), processes)
    one, two = (sorted((tmp_path / str(processes) / "predictions").iterdir()) for processes in (1, 2))
    assert [file.name for file in one] == [file.name for file in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def trained(folder: Path, method: str = "ats", budget: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a small model after six steps under a reduction."""
    torch.manual_seed(seed)
    task = small_task()
    small_trainer(folder, callbacks=[ReduceTokens(method, budget)]).fit(task, small_data())
    return task.model.state_dict()


def differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_training_is_seeded_and_feels_the_reduction(tmp_path: Path) -> None:
    first = trained(tmp_path, "random")
    assert not differs(first, trained(tmp_path, "random"))
    assert differs(first, trained(tmp_path, "random", 1.0)), "the reduction changed nothing"


@pytest.mark.parametrize("method", ["ats", "topk", "evit", "tome", "random"])
def test_every_parameter_learns_through_the_tokens_that_are_kept(method: str) -> None:
    torch.manual_seed(0)
    model = narrows.create_model("vit_mini", **SHAPE, global_pool="token").train()
    with narrows.reduce_tokens(model, method=method, budget=0.5):
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_trainer_gives_the_model_back(tmp_path: Path) -> None:
    task = small_task()
    callback = ReduceTokens("topk", 0.5)
    small_trainer(tmp_path, callbacks=[callback]).fit(task, small_data())
    assert not callback.reduction.attached


def test_fit_starts_from_a_saved_model_and_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = {**SHAPE, **SIZES, "global_pool": "token"}
    narrows.create_model("vit_mini", **shape).save_pretrained(tmp_path / "start")
    quick = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"
    quiet = "--trainer.enable_progress_bar false --trainer.accelerator cpu --trainer.devices 1"
    callback = "--trainer.callbacks+=narrows.training.callbacks.ReduceTokens"
    options = f"--model {tmp_path / 'start'} --data digits --data.image_size 16 {quick} {quiet} {callback}"
    chosen = "--trainer.callbacks.method=topk --trainer.callbacks.budget=0.5"
    assert main(["fit", *options.split(), *chosen.split()]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    left, start = narrows.load_model(run / "model"), narrows.load_model(tmp_path / "start")
    assert differs(left.state_dict(), start.state_dict())
    arguments = json.loads((run / "reduction.json").read_text())
    assert (arguments["method"], arguments["budget"]) == ("topk", 0.5)
    narrows.reduce_tokens(left, **arguments)


def test_an_exception_takes_the_reduction_out_of_the_model(tmp_path):
    task = small_task()
    before = [(type(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in task.modules()]

    class Fails(Callback):
        def on_train_batch_end(self, *_) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        small_trainer(tmp_path, callbacks=[ReduceTokens(), Fails()]).fit(task, small_data())
    after = [(type(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in task.modules()]
    assert after == before
