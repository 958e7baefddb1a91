"""`narrows fit` and what follows it, for another task than classification."""

import json

import pytest
import torch

from narrows.cli import main
from narrows.models.segmenter import Segmenter

MODEL = json.dumps({"dims": [8, 16], "depths": [1, 1], "heads": [1, 2], "window_size": 4})
SMALL = ["--task", "segmentation", "--model.model_args", MODEL, "--model.dim", "8", "--data.image_size", "32"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"]


def _only(found):
    (path,) = found
    return path


def test_a_segmenter_is_trained_judged_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, *QUIET, *SHORT]) == 0
    run = _only((tmp_path / "runs").iterdir())
    assert _only((run / "checkpoints").glob("epoch=0-*.ckpt"))  # monitored is val/mean_iou
    images = torch.randn(1, 1, 32, 32)
    assert Segmenter.from_pretrained(run / "model")(images).shape == (1, 11, 32, 32)

    # The saved configuration says which task it was.
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(["test", *given, "--trainer.limit_test_batches", "2"]) == 0
    assert "test mean iou: " in capsys.readouterr().out
    # So does the checkpoint.
    assert main(["predict", "--checkpoint", str(run), *QUIET, "--trainer.limit_predict_batches", "2"]) == 0
    folder = _only((tmp_path / "runs").glob("*/predictions"))
    assert f"Predictions are in {folder.relative_to(tmp_path)}" in capsys.readouterr().out
    assert len(list(folder.glob("*.png"))) == 128  # two batches
    assert folder.with_suffix(".png").is_file()


def test_options_come_before_the_last_configuration_and_that_before_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("task: segmentation\n")
    (tmp_path / "b.yaml").write_text("task: classification\n")

    def printed(*options: str) -> str:
        assert main(["fit", *options, "--print_config"]) == 0
        return capsys.readouterr().out

    assert "task: classification" in printed()
    assert "task: segmentation" in printed("--config", "a.yaml")
    assert "monitor: val/mean_iou" in printed("--config=b.yaml", "--config=a.yaml")
    assert "monitor: val/accuracy" in printed("--config", "a.yaml", "--task", "classification")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--task", "segment"], 1, "task: expected one of ('classification', 'segmentation'"),
        (["--task", "segmentation", "--model.dims", "3"], 2, "Did you mean --model.dim?"),
        (["--task", "segmentation", "--data", "photos"], 1, "data: expected 'digits', the only images here"),
        (["--task", "segmentation", "--model", "vit_mini"], 1, "features_only: expected a model with stages"),
        (["--task", "segmentation", "--data.augmentation.erasing", "1"], 2, "augmentation"),
        (["--data.augmentation.erasing", "2"], 1, "erasing: expected a share in [0, 1], got 2"),
    ],
)
def test_bad_input_is_explained(options, code, message, capsys):
    assert main(["fit", *options, *QUIET]) == code
    assert message in capsys.readouterr().err


def test_a_broken_configuration_is_explained(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("task: [segmentation\n")
    assert main(["fit", "--config", str(tmp_path / "broken.yaml")]) == 2
    assert "Problems parsing config" in capsys.readouterr().err
