"""What is saved is what opens again, or it is not saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrows.errors import InvalidArgument, NarrowsError
from narrows.models import create_model, load_model
from narrows.models.segmenter import Segmenter
from narrows.weights import read_config

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "channels": 1,
    "num_classes": 2,
    "dim": 8,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 8,
}


def changed(change: Callable[[Any], Any]) -> nn.Module:
    model = create_model("vit_mini", **SMALL)
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "head", nn.Linear(8, 5)), r"head.weight of shape \(5, 8\) in place of \(2, 8\)"),
        (
            lambda m: setattr(m, "head", nn.Sequential(nn.Linear(8, 2))),
            "no head.weight, no head.bias, also head.0.weight",
        ),
        (lambda m: setattr(m, "norm", nn.LayerNorm(8, eps=0.1)), r"norm is now LayerNorm\(\(8,\), eps=0.1"),
        (lambda m: setattr(m, "head", nn.Linear(8, 2, bias=False)), "no head.bias"),
        (lambda m: m.blocks.append(m.blocks[0]), "also blocks.2"),
        (lambda m: m.blocks.pop(1), "no blocks.1"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.head), "no head.weight, also head.parametrizations.weight"),
        (lambda m: m.register_buffer("mean", torch.zeros(1)), "also mean"),
    ],
)
def test_a_model_whose_parts_were_changed_is_not_saved(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    model: Any = changed(change)
    with pytest.raises(InvalidArgument, match=f"model: expected the parts that ViT makes of its arguments.*{message}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_no_change_of_parts_is_saved(tmp_path: Path) -> None:
    model = create_model("vit_mini", **SMALL)
    model.head.weight.requires_grad_(False)
    model.norm.register_forward_hook(lambda *_: None)
    images = torch.randn(1, 1, 16, 16)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(images), model(images))
    model.bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).head.weight.dtype == torch.float32


def test_a_backbone_that_cannot_be_saved_is_given_again(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def backbone() -> nn.Module:
        return timm.create_model("test_resnet", features_only=True, in_chans=1, out_indices=(1, 2))

    model = Segmenter(backbone(), num_classes=3, channels=1, dim=8).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 1, 32, 32)
    opened = Segmenter.from_pretrained(tmp_path, backbone=backbone())
    assert torch.equal(opened(images), model(images))
    message = r"backbone: expected what the saved Segmenter was built with, .*from_pretrained\(..., backbone=...\)"
    with pytest.raises(InvalidArgument, match=message):
        Segmenter.from_pretrained(tmp_path)
    other = timm.create_model("test_vit", features_only=True, in_chans=1, out_indices=(1, 2))
    with pytest.raises(InvalidArgument, match="weights: expected the parameters of a Segmenter, all of them"):
        Segmenter.from_pretrained(tmp_path, backbone=other)


def test_what_is_neither_a_folder_nor_on_the_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path / "nowhere", "nobody/nothing", "a b c"):
        with pytest.raises(NarrowsError, match="is no folder, and could not be downloaded from the hub"):
            Segmenter.from_pretrained(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"weights: expected a file with weights, .*does not exist"):
        Segmenter.from_pretrained(tmp_path)


def test_arguments_over_those_that_were_saved_have_to_fit_the_weights(tmp_path: Path) -> None:
    model = create_model("vit_mini", **SMALL)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, dtype=torch.float64).head.weight.dtype == torch.float64
    with pytest.raises(InvalidArgument, match=r"weights: .*head.weight of shape \(2, 8\) in place of \(3, 8\)"):
        type(model).from_pretrained(tmp_path, num_classes=3)


def test_names_of_classes_are_saved_with_the_model(tmp_path: Path) -> None:
    model = create_model("vit_mini", num_classes=2)
    model.save_pretrained(tmp_path / "unnamed")
    assert "classes" not in json.loads((tmp_path / "unnamed" / "config.json").read_text())
    model.classes = ("cat", "d\u00f6g")
    model.save_pretrained(tmp_path / "named")
    assert load_model(tmp_path / "named").classes == ("cat", "d\u00f6g")
    config = read_config(tmp_path / "named" / "config.json")
    (tmp_path / "named" / "config.json").write_text(json.dumps({**config, "classes": 7}))
    with pytest.raises(InvalidArgument, match="classes: expected a list of the names of the classes, got 7"):
        load_model(tmp_path / "named")
