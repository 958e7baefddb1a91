"""Models by name and path: what comes back, and what is said where nothing can."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from narrows.errors import InvalidArgument, NarrowsError
from narrows.hub.loaded import Opened, outputs, read_weights
from narrows.hub.models import open_model
from tests.hub.small_models import save_ours, save_timm, save_transformers


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def answer(opened: Opened) -> torch.Tensor:
    """What the model gives for one prepared image."""
    assert opened.prepare is not None
    image = opened.prepare(Image.new("RGB", (50, 40), (200, 30, 30)))
    assert image.shape == (len(opened.mean), *opened.size)
    red = opened.picture(image[None])[0].mean((1, 2))
    assert torch.allclose(red * 255, torch.tensor([200.0, 30.0, 30.0]), atol=1.0), "pictures undo the normalisation"
    return outputs(opened.module(image[None]))


def test_ours_from_a_folder_and_with_a_checkpoint(tmp_path: Path) -> None:
    opened = open_model(save_ours(tmp_path))
    assert (opened.size, opened.num_classes, opened.prepare) == ((16, 16), 2, None)
    assert not opened.module.training
    weights = {name: value + 1 for name, value in opened.module.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = open_model(str(tmp_path), tmp_path / "other.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in other.module.state_dict().items())
    assert open_model("vit_mini").num_classes == 10


def test_timm_with_a_checkpoint_has_its_classes_and_its_preparation(tmp_path: Path) -> None:
    opened = open_model("timm:test_vit", save_timm(tmp_path / "weights.pth", num_classes=2))
    assert (opened.name, opened.num_classes, opened.size) == ("timm:test_vit", 2, (160, 160))
    assert answer(opened).shape == (1, 2)
    thousand = open_model("timm:test_vit", save_timm(tmp_path / "weights.pth", num_classes=1000))
    assert thousand.classes[:2] == ("n01440764", "n01443537"), "WordNet's ids, in the order of ImageNet"


def test_transformers_from_a_folder(tmp_path: Path) -> None:
    opened = open_model(f"hf:{save_transformers(tmp_path)}")
    assert (opened.num_classes, opened.classes, opened.size) == (2, ("blue", "red"), (32, 32))
    assert answer(opened).shape == (1, 2)
    weights = {name: value + 1 for name, value in opened.module.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = open_model(f"hf:{tmp_path}", tmp_path / "other.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in other.module.state_dict().items())


def test_transformers_without_classes_gives_features(tmp_path: Path) -> None:
    opened = open_model(f"hf:{save_transformers(tmp_path, classifies=False)}")
    assert (opened.num_classes, opened.classes) == (0, ())
    assert answer(opened).shape == (1, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_mni", "model: expected timm:<name>, hf:<name or folder>, .*Did you mean 'vit_mini'"),
        ("resnet50", "A model of timm's is called timm:resnet50"),
        ("timm:vit_smal_patch16_224", "model: expected a model of timm's, .*Did you mean vit_small_patch16_224"),
        ("timm:test_vit", "pretrained weights of timm's test_vit could not be had .*--checkpoint"),
        ("hf:nobody/nothing", "nobody/nothing could not be had from the hub .*give the folder as hf:<folder>"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        open_model(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="folder: expected a folder written by save_pretrained"):
        open_model(str(tmp_path))
    with pytest.raises(InvalidArgument, match=r"model: expected a folder with config.json, preprocessor_config.json"):
        open_model(f"hf:{tmp_path}")


def test_checkpoints_hold_weights_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"checkpoint: expected a file with weights, got .*which is none"):
        read_weights(tmp_path / "missing.pth")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(InvalidArgument, match="weights_only=True"):
        read_weights(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InvalidArgument, match="expected tensors by name"):
        read_weights(tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(InvalidArgument, match="expected safetensors"):
        read_weights(tmp_path / "text.safetensors")
    torch.save({"state_dict": {"module.a": torch.ones(1)}}, tmp_path / "wrapped.pth")
    assert list(read_weights(tmp_path / "wrapped.pth")) == ["a"]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "ours")
    with pytest.raises(InvalidArgument, match="checkpoint: expected the weights of a ViT of this size"):
        open_model(folder, save_timm(tmp_path / "weights.pth"))
    with pytest.raises(InvalidArgument, match="checkpoint: expected the weights of a VisionTransformer of this size"):
        open_model("timm:test_vit", f"{folder}/model.safetensors")
