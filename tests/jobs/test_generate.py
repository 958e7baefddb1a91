import numpy as np
import pytest
from PIL import Image

from narrows.cli import main
from narrows.data.scene_documents import DigitPrompts
from narrows.hub.readers import Reader
from narrows.jobs import generate as task
from tests.data.folders import write_image
from tests.hub.flamingo_parts import TOKENIZER, open_gates, save_parts, small_task


@pytest.fixture
def saved(tmp_path):
    """Folders of a language model and of what was added to it."""
    language_model, _ = save_parts(tmp_path)
    made = open_gates(small_task()).flamingo
    made.language_model.save_pretrained(language_model)
    Reader(made, TOKENIZER).save(tmp_path / "model")
    return ["--lm", language_model, "--checkpoint", str(tmp_path / "model")]


@pytest.fixture
def media(tmp_path):
    return ",".join(str(write_image(tmp_path / name, size=(30, 20))) for name in ("a.png", "b.png"))


def test_generate_writes_after_a_prompt(saved, media, capsys):
    options = ["--prompt", "<image>here is a two<|endofchunk|><image>the second shows a", "--media", media]
    assert main(["generate", *saved, *options, "--max-new-tokens", "3"]) == 0
    written = capsys.readouterr().out.strip()
    assert main(["generate", *saved, *options, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == written


def test_pictures_without_a_place_stand_before_the_prompt(saved, media, capsys):
    outputs = []
    for prompt in ("the second", "<image><image>the second"):
        assert main(["generate", *saved, "--prompt", prompt, "--media", media, "--max_new_tokens", "4"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_picture_shows_which_image_each_word_looked_at(saved, media, tmp_path):
    options = ["--prompt", "here is", "--media", media, "--picture", str(tmp_path / "p.png"), "--max_new_tokens", "2"]
    assert main(["generate", *saved, *options]) == 0
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("L").resize((64, 64)))
    assert pixels.std() > 10


def test_without_arguments_the_offline_job_runs(monkeypatch, tmp_path, capsys):
    """Its reader is an untrained one here; `tests/demo/test_reader.py` shows what it is made of."""
    monkeypatch.setattr(task, "digits_reader", lambda *_, **__: Reader(open_gates(small_task()).flamingo, TOKENIZER))
    monkeypatch.setattr(task, "load_scene_documents", lambda _, split, **kw: DigitPrompts(split, **kw, length=20))
    assert main(["generate", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "questions about held-out images, answered exactly:" in printed
    assert "By the same language model without images:" in printed
    assert f"Which image each word looked at: {tmp_path / 'reading.png'}" in printed
    assert (tmp_path / "reading.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--lm x --prompt a", 1, "checkpoint: expected to be given with lm, got None"),
        ("--checkpoint x --prompt a", 1, "lm: expected to be given with checkpoint, got None"),
        ("--media a.png", 1, "prompt: expected a text, with <image> where a picture stands"),
        ("--lm x --checkpoint y", 1, "prompt: expected a text"),
        ("--lm x --checkpoint y --prompt a", 1, "checkpoint: expected a folder with reader.json"),
        ("--prompt a --max_new_tokens 0", 1, "max_new_tokens: expected a positive integer, got 0"),
        ("--prompt a --device tpu", 1, "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"),
        ("--promt a", 2, "Did you mean --prompt?"),
    ],
)
def test_bad_input_is_explained(options, code, message, capsys):
    assert main(["generate", *options.split()]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ("nope.png", "media: expected picture files, got 'nope.png', which does not exist"),
        ("broken.png", "broken.png cannot be read as an image"),
        ("", "media: expected 1 pictures, one for each <image> of prompt 0, got 0"),
    ],
)
def test_bad_pictures_are_named(saved, media, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_text("no picture")
    assert main(["generate", *saved, "--prompt", "<image>a", "--media", media]) == 1
    assert message in capsys.readouterr().err
