"""One small model of each family that tokens can be reduced in; every test of what all of them promise runs over it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import narrows
from tests.adapters.token_reduction.families import FAMILIES, awake

SIDE, PATCH = 32, 8


def config(kind: str, **kwargs: Any) -> Any:
    """The configuration of a small model of transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": PATCH}
    patches = {"num_patches": (SIDE // PATCH) ** 2} if kind.startswith("Siglip2") else {"image_size": SIDE}
    hidden = {"mlp_ratio": 2} if kind.startswith("Dinov2") else {"intermediate_size": 48}
    return getattr(transformers, kind)(**sizes, **patches, **hidden, **kwargs)


def _transformers(kind: str, of: str, **kwargs: Any) -> nn.Module:
    return awake(getattr(transformers, kind)(config(of, **kwargs)))


def _narrows(**kwargs: Any) -> nn.Module:
    return awake(narrows.create_model("vit_mini", **kwargs))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    **{f"timm {name}": family for name, family in FAMILIES.items()},
    "transformers vit": partial(_transformers, "ViTModel", "ViTConfig"),
    "transformers deit": partial(_transformers, "DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "transformers dinov2": partial(_transformers, "Dinov2ForImageClassification", "Dinov2Config"),
    "transformers dinov2, gated": partial(_transformers, "Dinov2Backbone", "Dinov2Config", use_swiglu_ffn=True),
    "transformers dinov2, registers": partial(
        _transformers, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4
    ),
    "transformers dinov3": partial(_transformers, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "transformers clip": partial(_transformers, "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "transformers siglip": partial(_transformers, "SiglipVisionModel", "SiglipVisionConfig"),
    "transformers siglip2": partial(_transformers, "Siglip2VisionModel", "Siglip2VisionConfig"),
    "narrows vit": _narrows,
    "narrows vit, class token": partial(_narrows, global_pool="token"),
    "narrows vit, greatest pooled": partial(_narrows, global_pool="max"),
}


def inputs(model: nn.Module, batch: int, side: int | None = None) -> dict[str, Any]:
    """Random images as the model takes them, of its own size or another."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.Siglip2VisionModel):  # takes patches
        patches = torch.randn(batch, (SIDE // PATCH) ** 2, 3 * PATCH**2, generator=generator)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.full((batch, 2), SIDE // PATCH),
        }
    name = {"transformers": "pixel_values", "narrows": "images"}.get(type(model).__module__.partition(".")[0], "x")
    if side is None:
        side = model.patch_embed.img_size[0] if name == "x" else SIDE  # pyright: ignore
    return {name: torch.randn(batch, 3, side, side, generator=generator)}


def outputs(model: nn.Module, arguments: dict[str, Any], **kwargs: object) -> list[Tensor]:
    """Every tensor that the model returns."""
    return tree_leaves(model(**arguments, **kwargs))


def of_image(arguments: dict[str, Any], image: int) -> dict[str, Any]:
    """The inputs of one image."""
    return {name: value[image : image + 1] for name, value in arguments.items()}
