"""Small vision transformers, saved in every way that they can be opened by, and small folders of images."""

from pathlib import Path

import pytest
import torch

from narrows.models import create_model
from tests.data.folders import write_classes

SHAPE = {"image_size": 16, "channels": 3, "num_classes": 2, "dim": 16, "depth": 4, "heads": 2, "mlp_dim": 16}


def save_ours(folder: Path) -> str:
    """A vision transformer of narrows with a class token, for images of 16 pixels."""
    torch.manual_seed(0)
    create_model("vit_mini", **SHAPE, global_pool="token").save_pretrained(folder)
    return str(folder)


def save_timm(file: Path, num_classes: int = 2) -> str:
    """Weights of timm's smallest vision transformer."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", num_classes=num_classes).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights}, file)
    return str(file)


def save_transformers(folder: Path, *, classifies: bool = True) -> str:
    """A vision transformer of transformers with its processor, for images of 32 pixels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=8, id2label={0: "blue", 1: "red"}, label2id={"blue": 0, "red": 1}
    )
    model = transformers.ViTForImageClassification(config) if classifies else transformers.ViTModel(config)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_images(folder: Path) -> str:
    """Two classes of eight images."""
    return str(write_classes(folder, {"blue": 8, "red": 8}))
