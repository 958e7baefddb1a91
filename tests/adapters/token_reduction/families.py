"""Vision transformers of every family, as small as they come, with weights that leave no part of them idle."""

from collections.abc import Callable, Mapping
from functools import partial

import timm
import torch
from timm.layers.attention import Attention
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tests.support import needs

SIZE = 64
SMALL = {"img_size": SIZE, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def images(batch: int = 4, size: int = SIZE) -> Tensor:
    """Always the same random images."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def awake(model: nn.Module) -> nn.Module:
    """The model with weights as large as a trained one's, none of them 0 or 1: layer scales, biases, norms, tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and not name.endswith(("token", "pos_embed", "latent")):
                gain = 3.0 if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")) else 1.0
                parameter.copy_(gain * noise * parameter[0].numel() ** -0.5)
            elif "norm" in name or "gamma" in name or ".ls" in name:
                parameter.copy_(0.8 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


class GatedAttention(Attention):
    """Attention with a gate, which models ask for through a keyword that blocks do not pass on."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, gated=True, **kwargs)  # pyright: ignore


def vit(**changes: object) -> nn.Module:
    """A small `VisionTransformer`."""
    return awake(VisionTransformer(**{**SMALL, "patch_size": 8, **changes}))  # pyright: ignore


def eva(**changes: object) -> nn.Module:
    """A small `Eva` with rotary positions."""
    return awake(Eva(**{**SMALL, "patch_size": 8, "use_rot_pos_emb": True, **changes}))  # pyright: ignore


def since(oldest: str, make: Callable[..., nn.Module], **changes: object) -> nn.Module:
    """A model that timm builds since version `oldest`; with an older one the test is skipped."""
    needs("timm", oldest)
    return make(**changes)


def named(name: str, **changes: object) -> nn.Module:
    """A model of timm's own name, narrowed."""
    return awake(timm.create_model(name, **{**SMALL, **changes}))


def naflex(name: str, **changes: object) -> nn.Module:
    """A small `NaFlexVit`."""
    small = {**SMALL, "patch_size": 8, "pos_embed_grid_size": (8, 8), **changes}
    return awake(timm.create_model(name, **small))


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "deit": partial(named, "deit_tiny_distilled_patch16_224", patch_size=8),
    "deit3": partial(named, "deit3_small_patch16_224", patch_size=8),
    "augreg": partial(named, "vit_tiny_patch16_224.augreg_in21k", patch_size=8),
    "dinov2_registers": partial(named, "vit_small_patch14_reg4_dinov2", img_size=70, patch_size=7),
    "clip": partial(named, "vit_xsmall_patch16_clip_224", patch_size=8),
    "siglip": partial(named, "vit_base_patch16_siglip_224", patch_size=8),
    "mean_pooled": partial(named, "vit_base_patch16_siglip_gap_224", patch_size=8),
    "greatest_pooled": partial(vit, class_token=False, global_pool="max"),
    "query_key_norm": partial(vit, qk_norm=True),
    "sub_norm": partial(vit, scale_attn_norm=True, scale_mlp_norm=True),
    "gated": partial(since, "1.0.28", vit, attn_layer=GatedAttention),
    "residual_post_norm": partial(vit, block_fn=ResPostBlock),
    "eva02": partial(named, "eva02_tiny_patch14_224", img_size=56, patch_size=7),
    "eva02_clip": partial(named, "eva02_base_patch16_clip_224", patch_size=8),
    "dinov3": partial(named, "vit_small_patch16_dinov3", patch_size=8),
    "rope_mixed": partial(named, "vit_small_patch16_rope_mixed_224", patch_size=8),
    "perception_encoder": partial(named, "vit_pe_core_tiny_patch16_384", patch_size=8),
    "eva_post_norm": partial(eva, use_post_norm=True),
    "beit": partial(named, "beit_base_patch16_224", patch_size=8, init_values=0.1),
    "beit, shared": partial(
        named, "beit_base_patch16_224", patch_size=8, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "naflex": partial(naflex, "naflexvit_base_patch16_map", reg_tokens=2, class_token=True),
    "naflex, rotary": partial(naflex, "naflexvit_base_patch16_gap", rope_type="axial", pos_embed="none"),
    "eva_grouped_queries": partial(
        since, "1.0.30", eva, attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True
    ),
}
