"""`narrows reduce` on checkpoints as they lie about: what is taken of them, what is said, and what is refused."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from narrows.cli import main
from narrows.jobs import reduce as job
from narrows.jobs.trials import Candidate
from tests.hub.small_models import save_images

timm = pytest.importorskip("timm")
Weights = dict[str, Tensor]


def _weights(num_classes: int = 2, **kwargs: Any) -> Weights:
    torch.manual_seed(num_classes)
    return timm.create_model("test_vit", num_classes=num_classes, **kwargs).state_dict()


def _under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def _body(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith("head.")}


def _moved(weights: Weights) -> Weights:
    return {name: value + 1 for name, value in weights.items()}


def _with_arguments(weights: Weights) -> dict[str, Any]:
    arguments = Namespace(model="test_vit", output=PosixPath("runs"), lr=np.float64(1e-3))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    return {"model": weights, "optimizer": optimizer, "epoch": 3, "args": arguments, "scaler": None}


def _dino(student: Weights, teacher: Weights) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.zeros(3, 64)}
    student = _under("module.", _under("backbone.", _body(student)) | head)
    return {"student": student, "teacher": _under("backbone.", _body(teacher)) | head, "args": Namespace()}


# What is in the file, options, how many classes there are then, and what is said.
LYING: dict[str, tuple[Callable[[Weights], Any], str, int, tuple[str, ...]]] = {
    "arguments": (_with_arguments, "", 2, ("The checkpoint has 2 classes, not 1000.",)),
    "lightning": (
        lambda w: {"state_dict": _under("model.", w), "hyper_parameters": {"lr": 1.0}, "callbacks": {}},
        "",
        2,
        ("Weights are those under 'state_dict.model'.",),
    ),
    "compiled": (lambda w: _under("_orig_mod.", w), "", 2, ("Weights are those under '_orig_mod'.",)),
    "lightning, compiled": (
        lambda w: {"state_dict": _under("model._orig_mod.", w)},
        "",
        2,
        ("Weights are those under 'state_dict.model._orig_mod'.",),
    ),
    "parallel": (lambda w: {"state_dict": _under("module.", w)}, "", 2, ("'state_dict.module'",)),
    "backbone": (
        lambda w: _under("backbone.", _body(w)) | {"fc.weight": torch.zeros(2, 64)},
        "",
        0,
        ("Weights are those under 'backbone'.", "The checkpoint has no head: the model gives features."),
    ),
    "teacher": (
        lambda w: _dino(_moved(w), w),
        "",
        0,
        ("'teacher.backbone'; checkpoint_key may name 'student.module.backbone' too.",),
    ),
    "student": (
        lambda w: _dino(w, _moved(w)),
        "--checkpoint-key student",
        0,
        ("Weights are those under 'student.module.backbone'.",),
    ),
    "average, not asked for": (
        lambda w: {"state_dict": w, "state_dict_ema": _moved(w)},
        "",
        2,
        ("Weights are those under 'state_dict'; checkpoint_key may name 'state_dict_ema' too.",),
    ),
    "average": (
        lambda w: {"model": _moved(w), "model_ema": w},
        "--checkpoint_key model_ema",
        2,
        ("Weights are those under 'model_ema'.",),
    ),
    "average, alone": (lambda w: {"model_ema": w}, "", 2, ("Weights are those under 'model_ema'.",)),
    "no head": (lambda w: {"model": _body(w)}, "", 0, ("The checkpoint has no head: the model gives features.",)),
    "head, not asked for": (_with_arguments, "--num-classes 0", 0, ()),
    "head, asked for": (_with_arguments, "--num_classes 2", 2, ()),
    "another size": (
        _with_arguments,
        "--image-size 96",
        2,
        ("Positions of a grid of 10 x 10 are interpolated to 6 x 6.",),
    ),
}
BASE = "reduce --model timm:test_vit --method topk --device cpu --limit 4 --batch-size 2"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """The models that would be measured, in the place of measuring them."""
    found: list[Candidate] = []

    def instead(candidates: list[Candidate], *_: Any, **__: Any) -> None:
        found.extend(candidates)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_trials", instead)
    return found


@pytest.mark.parametrize("name", LYING)
def test_checkpoints_as_they_lie_about(
    name: str, images: str, seen: list[Candidate], tmp_path: Path, capsys: Any
) -> None:
    write, options, num_classes, said = LYING[name]
    weights = _weights()
    torch.save(write(weights), tmp_path / "run.pth")
    given = f"--data {images} --checkpoint {tmp_path / 'run.pth'} --output {tmp_path / 'runs'}"
    assert main([*BASE.split(), "--budget", "50%", *given.split(), *options.split()]) == 130
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert all(each in told for each in said), told
    untouched, reduced = seen
    assert untouched.model.num_classes == num_classes
    assert reduced.reduction is not None
    assert [entry for entry in reduced.reduction.schedule if entry is not None] == [0.5]
    side = untouched.model.size[0]
    assert side == (96 if "--image-size" in options else 160)
    reference = timm.create_model("test_vit", num_classes=num_classes, img_size=side).eval()
    if side == 160:
        reference.load_state_dict(_body(weights) if num_classes == 0 else weights)
        batch = torch.randn(2, 3, side, side)
        assert torch.equal(untouched.model.outputs(batch), reference(batch))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (lambda w: timm.create_model("test_vit"), "", "tensors by name, got an object of class timm.models"),
        (lambda w: {"args": Namespace()}, "", "tensors by name, got objects of argparse.Namespace in"),
        (lambda w: [w], "", "tensors by name, got an object of class list"),
        (lambda w: {}, "", "tensors by name, got none in"),
        (lambda w: timm.create_model("test_resnet").state_dict(), "", "weights of a VisionTransformer of this size"),
        (lambda w: {n: v for n, v in w.items() if n != "pos_embed"}, "", "no pos_embed in"),
        (_with_arguments, "--checkpoint-key ema", "checkpoint_key: expected where weights are in"),
        (_with_arguments, "--num-classes 5", "num_classes: expected 2, as the head in"),
        (lambda w: _body(w), "--num-classes 5", "num_classes: expected none (there is no head in the file)"),
        (_with_arguments, "--num-classes -1", "num_classes: expected 0 (features) or more, got -1"),
        (_with_arguments, "--image-size 97", "image_size: expected a size that timm:test_vit takes, got 97"),
        (_with_arguments, "--image-size 0", "image_size: expected a positive integer, got 0"),
        (_with_arguments, "--budget 101", "budget: expected a count of 1 to 100 tokens, got 101"),
        (_with_arguments, "--budget 1:50%/3:70%", "budget: expected entries that do not grow"),
    ],
)
def test_what_will_not_do_is_said_on_a_few_lines(
    content: Callable[[Weights], Any],
    options: str,
    message: str,
    images: str,
    seen: list[Candidate],
    tmp_path: Path,
    capsys: Any,
) -> None:
    torch.save(content(_weights()), tmp_path / "run.pth")
    given = f"--data {images} --checkpoint {tmp_path / 'run.pth'} --output {tmp_path / 'runs'}"
    assert main([*BASE.split(), *given.split(), *options.split()]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert sum(-(-len(line) // 80) for line in told.splitlines()) <= 12, told
    assert not seen
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("budget", ["300", "9:0.5", "0:0.2/1:0.5", "0.0001G"])
def test_a_budget_that_cannot_be_met_is_refused_before_the_digits_model_is_trained(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("narrows.demo.vit.train", lambda *_, **__: pytest.fail("it is trained"))
    line = f"reduce --method topk --budget {budget} --output {tmp_path / 'runs'} --device cpu"
    assert main(line.split()) == 1
    assert "narrows: budget: expected" in capsys.readouterr().err
