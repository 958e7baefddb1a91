"""Recipes of `recipes/flamingo`, on small parts: the real ones are trained first, or downloaded."""

from pathlib import Path

import pytest

from narrows.cli import main
from narrows.jobs import fit_flamingo
from tests.hub.flamingo_parts import save_parts

RECIPES = Path(__file__).parents[2] / "recipes" / "flamingo"
QUICK = "--trainer.accelerator cpu --trainer.devices 1 --trainer.enable_progress_bar false"
FEW = (
    f"{QUICK} --trainer.limit_train_batches 2 --trainer.limit_val_batches 2 --trainer.max_epochs 1"
    " --trainer.log_every_n_steps 1"
)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Small parts under the names the recipes give, in an empty place."""
    language_model, encoder = save_parts(tmp_path)
    monkeypatch.setattr(fit_flamingo, "digits_language_model", lambda: Path(language_model))
    monkeypatch.setattr(fit_flamingo, "digits_vision_encoder", lambda: Path(encoder))
    monkeypatch.chdir(tmp_path)
    return language_model, encoder


def test_every_recipe_says_how_it_runs_and_what_to_expect():
    for recipe in RECIPES.glob("*.yaml"):
        header = recipe.read_text()
        assert f"# Command:   narrows fit --config recipes/flamingo/{recipe.name}" in header
        assert "# Expected:  " in header


def test_the_digits_recipe_leaves_what_generate_takes(parts, tmp_path, capsys):
    assert main(["fit", "--config", str(RECIPES / "digits.yaml"), *FEW.split()]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    metrics = (run / "metrics.csv").read_text().splitlines()[0]
    for name in ("train/loss", "val/loss", "val/loss_swapped", "val/image_gain", "gate/1.attn", "gate/1.ff"):
        assert name in metrics.split(",")
    language_model, _ = parts
    given = ["--lm", language_model, "--checkpoint", str(run / "model"), "--prompt", "here is a"]
    assert main(["generate", *given, "--max_new_tokens", "2"]) == 0

    last = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(["validate", *last]) == 0
    assert "held-out image gain: " in capsys.readouterr().out
    assert main(["predict", *last]) == 1
    assert "task: expected one that predicts, got 'flamingo'. Use `narrows generate`" in capsys.readouterr().err


def test_the_papers_recipe_fits_your_own_language_model_encoder_and_documents(parts, tmp_path):
    from tests.data.test_document_files import entry, write_folder

    language_model, encoder = parts
    data = write_folder(tmp_path / "documents", *(entry("<image>one <image>two", "red", "blue") for _ in range(24)))
    own = ["--model.language_model", language_model, "--model.vision_encoder", encoder, "--data.data", str(data)]
    tokens = ["--data.image_token", "<image>", "--data.end_of_chunk", "<|endofchunk|>"]
    few = [*FEW.split(), "--trainer.precision", "32-true", "--model.flamingo.every", "1", "--data.batch_size", "2"]
    assert main(["fit", "--config", str(RECIPES / "paper.yaml"), *own, *tokens, *few]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--model.language_model ./nope", 1, "language_model: expected a folder or a hub name"),
        ("--data.data nope", 1, "data: expected 'digits', a .jsonl file, a .tar shard, or a folder of them"),
        ("--data.image_token <img>", 1, "image_token: expected a token of the tokenizer, got '<img>'"),
        ("--data.mask_before_frist_image true", 2, "Did you mean --data.mask_before_first_image?"),
        ("--model.schedule linear", 1, "schedule: expected one of"),
    ],
)
def test_bad_input_is_explained(parts, options, code, message, capsys):
    assert main(["fit", "--config", str(RECIPES / "digits.yaml"), *QUICK.split(), *options.split()]) == code
    assert message in capsys.readouterr().err
