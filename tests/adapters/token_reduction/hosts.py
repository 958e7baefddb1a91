"""One small model of each family that tokens can be reduced in; every test of what all of them promise runs over it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
import torchvision
import transformers
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import narrows
from tests.adapters.token_reduction import layouts
from tests.adapters.token_reduction.families import FAMILIES, SIZE, awake
from tests.support import needs

SIDE, PATCH = 32, 8


VIDEO: dict[str, Any] = {"num_frames": 4, "tubelet_size": 2}
# What the configurations of some models call otherwise, or need besides.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Siglip2": {"num_patches": (SIDE // PATCH) ** 2},
    "VideoMAE": {"image_size": SIDE // 2, **VIDEO},
    "VJEPA2": {"crop_size": SIDE // 2, "frames_per_clip": 4, "tubelet_size": 2, "mlp_ratio": 2, "hidden_size": 48}
    | {"pred_num_hidden_layers": 1, "pred_hidden_size": 24, "pred_num_attention_heads": 2},
    "InternVL": {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_qk_norm": True},
    "ViTMAE": {"mask_ratio": 0.5, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2},
}


def config(kind: str, **kwargs: Any) -> Any:
    """The configuration of a small model of transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": PATCH}
    hidden = {"mlp_ratio": 2} if kind.startswith("Dinov2") else {"intermediate_size": 48}
    own = next((of for name, of in _SETTINGS.items() if kind.startswith(name)), {"image_size": SIDE})
    own = {**({"image_size": SIDE} if kind.startswith("ViTMAE") else {}), **own}
    return getattr(transformers, kind)(**{**sizes, **hidden, **own, **kwargs})


def _transformers(kind: str, of: str, **kwargs: Any) -> nn.Module:
    model = awake(getattr(transformers, kind)(config(of, **kwargs)))
    for part in model.modules():  # positions of video are no parameters
        if hasattr(part, "position_embeddings") and isinstance(part.position_embeddings, Tensor):
            part.position_embeddings.detach().add_(0.1)
    return model


def _open_clip(**kwargs: Any) -> nn.Module:
    if "qk_norm" in kwargs:
        needs("open-clip-torch", "3.0")
    shape = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2.0}
    settings = {**shape, "attn_pooler_heads": 2, "output_dim": 16, **kwargs}
    return awake(open_clip.transformer.VisionTransformer(**settings))


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
    "transformers vit mae": partial(_transformers, "ViTMAEModel", "ViTMAEConfig"),
    "transformers vit msn": partial(_transformers, "ViTMSNForImageClassification", "ViTMSNConfig"),
    "transformers i-jepa": partial(_transformers, "IJepaForImageClassification", "IJepaConfig"),
    "transformers beit": partial(
        _transformers, "BeitForImageClassification", "BeitConfig", use_relative_position_bias=True
    ),
    "transformers beit, shared": partial(
        _transformers, "BeitModel", "BeitConfig", use_shared_relative_position_bias=True, use_mean_pooling=False
    ),
    "transformers data2vec": partial(
        _transformers, "Data2VecVisionForImageClassification", "Data2VecVisionConfig", use_relative_position_bias=True
    ),
    "transformers data2vec, shared": partial(
        _transformers, "Data2VecVisionModel", "Data2VecVisionConfig", use_shared_relative_position_bias=True
    ),
    "transformers metaclip 2": partial(_transformers, "MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "transformers altclip": partial(_transformers, "AltCLIPVisionModel", "AltCLIPVisionConfig"),
    "transformers chinese clip": partial(_transformers, "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    "transformers blip": partial(_transformers, "BlipVisionModel", "BlipVisionConfig"),
    "transformers blip 2": partial(_transformers, "Blip2VisionModel", "Blip2VisionConfig"),
    "transformers instructblip": partial(_transformers, "InstructBlipVisionModel", "InstructBlipVisionConfig"),
    "transformers clipseg": partial(_transformers, "CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "transformers git": partial(_transformers, "GitVisionModel", "GitVisionConfig"),
    "transformers owl-vit": partial(_transformers, "OwlViTVisionModel", "OwlViTVisionConfig"),
    "transformers owl v2": partial(_transformers, "Owlv2VisionModel", "Owlv2VisionConfig"),
    "transformers internvl": partial(_transformers, "InternVLVisionModel", "InternVLVisionConfig"),
    "transformers idefics3": partial(_transformers, "Idefics3VisionTransformer", "Idefics3VisionConfig"),
    "transformers smolvlm": partial(_transformers, "SmolVLMVisionTransformer", "SmolVLMVisionConfig"),
    "transformers videomae": partial(_transformers, "VideoMAEForVideoClassification", "VideoMAEConfig"),
    "transformers v-jepa 2": partial(_transformers, "VJEPA2Model", "VJEPA2Config"),
    "openai clip": lambda: awake(layouts.VisionTransformer()),
    "open_clip": partial(_open_clip),
    "open_clip, averaging": partial(_open_clip, pool_type="avg", ls_init_value=0.1, output_tokens=True),
    "open_clip, attention pooling": partial(_open_clip, attentional_pool=True, attn_pooler_queries=3),
    "open_clip, norms": partial(_open_clip, qk_norm=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
    "torchvision": lambda: awake(
        torchvision.models.VisionTransformer(
            image_size=SIDE, patch_size=PATCH, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=48, num_classes=5
        )
    ),
    "hub dinov2": lambda: awake(layouts.DinoVisionTransformer()),
    "hub dinov3": lambda: awake(layouts.Dinov3()),
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
    name = model.main_input_name if "VJEPA2" in type(model).__name__ else "pixel_values"
    if name == "pixel_values_videos" or type(model).__name__.startswith("VideoMAE"):
        return {name: torch.randn(batch, VIDEO["num_frames"], 3, SIDE // 2, SIDE // 2, generator=generator)}
    noise = {}
    if type(model).__name__.startswith("ViTMAE"):  # which patches are seen
        noise = {"noise": torch.rand(batch, (SIDE // PATCH) ** 2, generator=generator)}
    name = {"transformers": name, "narrows": "images"}.get(type(model).__module__.partition(".")[0], "x")
    if side is None:
        of_timm = hasattr(model, "pretrained_cfg") or isinstance(model, VisionTransformer | Eva)
        side = SIZE if of_timm else SIDE
        side = getattr(getattr(model, "patch_embed", None), "img_size", (side,))[0]
    return {name: torch.randn(batch, 3, side, side, generator=generator), **noise}


def outputs(model: nn.Module, arguments: dict[str, Any], **kwargs: object) -> list[Tensor]:
    """Every tensor that the model returns, but for numbers of tokens."""
    leaves = tree_leaves(model(**arguments, **kwargs))
    return [tensor for tensor in leaves if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def of_image(arguments: dict[str, Any], image: int) -> dict[str, Any]:
    """The inputs of one image."""
    return {name: value[image : image + 1] for name, value in arguments.items()}
