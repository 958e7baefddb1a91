"""What is written gives what the model gives, at batches and sizes it was not traced with."""

from pathlib import Path

import pytest
import torch

import narrows
from narrows.cli import main
from narrows.errors import InvalidArgument
from narrows.hub.models import LoadedModel, open_model
from narrows.jobs.export import export, write_program
from tests.hub.small_models import save_ours, save_timm, save_transformers

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.compiled
def test_any_number_of_images_of_any_size(tmp_path: Path) -> None:
    weights = save_timm(tmp_path / "weights.pth")
    file = tmp_path / "model.onnx"
    found = export("timm:test_vit", file, checkpoint=weights, method="tome", any_size=True, device="cpu")
    assert file.exists()
    assert len(found.differences) == 3
    assert max(found.differences.values()) <= 1e-4
    assert "under tome 0.5, for any number of images of any size" in str(found)
    assert "Checked in ONNX Runtime" in str(found)
    assert "The checkpoint has 2 classes, not 1000." in str(found)


@pytest.mark.compiled
def test_a_program_of_torch_export_gives_the_reduced_logits(tmp_path: Path) -> None:
    folder, file = save_transformers(tmp_path / "model"), tmp_path / "model.pt2"
    found = export(f"hf:{folder}", file, method="ats", budget="50%", device="cpu")
    assert max(found.differences.values()) <= 1e-4
    model = open_model(f"hf:{folder}")
    images = torch.randn(7, model.channels, *model.size, generator=torch.Generator().manual_seed(0))
    program = torch.export.load(file).module()
    with torch.no_grad():
        untouched = model.outputs(images)
        with narrows.reduce_tokens(model.module, method="ats", budget=0.5):
            torch.testing.assert_close(program(images), model.outputs(images), atol=1e-4, rtol=0)
        assert (program(images) - untouched).abs().max() > 1e-3


@pytest.mark.compiled
def test_a_program_that_differs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(save_ours(tmp_path / "model"))
    load = torch.export.load
    with monkeypatch.context() as patch:

        class Other:
            def __init__(self, file: object) -> None:
                self.program = load(file).module()

            def module(self):
                return lambda images: self.program(images) + 1

        patch.setattr(torch.export, "load", Other)
        found = write_program(model, tmp_path / "model.pt2")
    assert found.differences[model.size] == pytest.approx(1, abs=1e-3)
    assert "That is more than roundings" in str(found)


def test_a_model_of_one_size_is_refused_any_size(tmp_path: Path) -> None:
    fixed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    model = LoadedModel("fixed", fixed, (16, 16), (0.5,) * 3, (0.5,) * 3, num_classes=4)
    with pytest.raises(InvalidArgument, match="any_size: expected a model that takes images of any size, got fixed"):
        write_program(model, tmp_path / "model.onnx", any_size=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("OURS model.pt", 1, "export: expected a file name ending in .onnx or .pt2, got 'model.pt'"),
        ("vit_mni model.onnx", 1, "Did you mean 'vit_mini'?"),
        ("OURS model.onnx --method tpk", 1, "method: expected one of"),
        ("OURS model.onnx --method topk --budget half", 1, "budget: expected a share (0.5 or 50%)"),
        ("OURS model.onnx --method topk --budget 17", 1, "budget: expected a count of 1 to 16 tokens, got 17"),
        ("OURS model.onnx --device tpu", 1, "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'tpu'"),
        ("OURS model.onnx --budget 0", 1, "budget: expected a method that it is the budget of, got '0'. Add --method."),
        ("OURS model.onnx --checkpoint-key ema", 1, "checkpoint_key: expected a checkpoint that it is a part of"),
        ("OURS model.onnx --checkpoint no.pth", 1, "'no.pth', which does not exist"),
        ("OURS model.onnx --any", 2, "narrows export: unrecognized arguments: --any"),
        ("OURS", 2, "output"),
    ],
)
def test_bad_input_is_refused_before_work_begins(
    arguments: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments.replace("OURS", save_ours(tmp_path / "ours"))
    assert main(["export", *given.split()]) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 1200
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
