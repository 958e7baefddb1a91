"""`narrows fit` on a reduced model: it learns, the same for the same seed, and says how it was reduced."""

import json
from pathlib import Path

import pytest
import torch

import narrows
from narrows.cli import main
from narrows.errors import InvalidArgument
from narrows.hub.starting import starting_model
from narrows.training.reduce_tokens import ReduceTokens
from tests.hub.small_models import SHAPE, save_ours
from tests.training.small import small_data, small_task, small_trainer

SIZES = {"num_classes": 10, "image_size": 16, "channels": 1}


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
    callback = "--trainer.callbacks+=narrows.training.reduce_tokens.ReduceTokens"
    options = f"--model {tmp_path / 'start'} --data digits --data.image_size 16 {quick} {quiet} {callback}"
    chosen = "--trainer.callbacks.method=topk --trainer.callbacks.budget=0.5"
    assert main(["fit", *options.split(), *chosen.split()]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    left, start = narrows.load_model(run / "model"), narrows.load_model(tmp_path / "start")
    assert differs(left.state_dict(), start.state_dict())
    arguments = json.loads((run / "reduction.json").read_text())
    assert (arguments["method"], arguments["budget"]) == ("topk", 0.5)
    narrows.reduce_tokens(left, **arguments)


def test_a_saved_model_for_other_images_is_refused(tmp_path: Path) -> None:
    folder = save_ours(tmp_path)
    with pytest.raises(InvalidArgument, match=r"model: expected a model for the data's .* got one for"):
        starting_model(folder, **SIZES)
    fits = {name: SHAPE[name] for name in SIZES}
    assert starting_model(folder, **fits).training
    with pytest.raises(InvalidArgument, match="model_args: expected none for a saved model"):
        starting_model(folder, **fits, depth=3)


def test_a_model_of_timms_is_fine_tuned_and_saved_for_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, pretrained=False, **rest))
    from narrows.hub.starting import save_model

    model = starting_model("timm:test_vit", num_classes=3, image_size=32, channels=1)
    images = torch.randn(2, 1, 32, 32)
    with narrows.reduce_tokens(model, budget=0.5):
        assert model(images).shape == (2, 3)
    save_model(model, tmp_path)
    monkeypatch.undo()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model.eval()(images))
