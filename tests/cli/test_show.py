import pytest
import torch
from PIL import Image

from narrows.cli import main
from narrows.models import create_model
from tests.data.folders import write_image


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    create_model("resampler_vit_mini", channels=1).save_pretrained(folder)
    return folder


def test_show_draws_one_picture_for_each_image_and_bottleneck(saved, tmp_path, capsys):
    assert main(["show", str(saved), "digits", "--limit", "2", "--output", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert {path.name.partition("-")[0] for path in drawn} == {"scene 0", "scene 1"}
    for path in drawn:
        pixels = torch.tensor(list(Image.open(path).convert("L").resize((64, 64)).getdata()))
        assert pixels.float().std() > 10
    assert f"Pictures of 2 images are in {tmp_path}" in capsys.readouterr().out


def test_show_takes_small_digits_too(tmp_path):
    torch.manual_seed(0)
    create_model("resampler_vit_mini", channels=1, image_size=56).save_pretrained(tmp_path / "model")
    assert main(["show", str(tmp_path / "model"), "small_digits", "--limit", "1", "--output", str(tmp_path)]) == 0
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.png")} == {"scene 0"}


def test_show_takes_files_and_folders_and_registry_names(tmp_path):
    write_image(tmp_path / "in" / "a.png", size=(50, 40))
    single = write_image(tmp_path / "b.jpg", size=(40, 50))
    arguments = [str(single), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-carriers", "2"]
    assert main(["show", "resampler_vit_mini", *arguments]) == 0
    assert {path.name.partition("-")[0] for path in (tmp_path / "out").iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vit_mni", "digits"], 1, "model: expected a folder with a saved model or one of"),
        (["vit_mini", "digits"], 1, "model: expected a model with a token bottleneck to show, got 'vit_mini'"),
        (
            ["resampler_vit_mini", "nope.png"],
            1,
            "images: expected image files or folders, got nope.png, which does not",
        ),
        (["resampler_vit_mini", "digits", "--limit", "0"], 1, "limit: expected a positive integer, got 0"),
        (["resampler_vit_mini"], 2, "images"),
        (["resampler_vit_mini", "digits", "--outptu", "x"], 2, "Did you mean --output?"),
    ],
)
def test_bad_input_is_explained(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_explained(tmp_path, capsys):
    assert main(["show", str(tmp_path), "digits"]) == 1
    assert "config.json" in capsys.readouterr().err
