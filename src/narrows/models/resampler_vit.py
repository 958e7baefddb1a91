"""A vision transformer that passes its tokens through the latents of a Perceiver resampler."""

from typing import Any

from torch import nn

from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.models.parts import Block, TokenEmbedding, TransformerClassifier
from narrows.models.vit import MINI, SMALL
from narrows.validation import check_positive


class ResamplerViT(TransformerClassifier):
    """A vision transformer whose last blocks are a Perceiver resampler (Alayrac et al. 2022, section 3.1.1).

    Args:
        resampler_depth: how many of the `depth` blocks are layers of the resampler.
        num_latents: latents that carry the image from there on.

    The other arguments are those of `ViT`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        channels: int = 3,
        stem: str = "patch",
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        resampler_depth: int = 1,
        num_latents: int = 8,
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim, num_latents=num_latents)
        blocks: list[nn.Module] = [Block(dim, heads=heads, mlp_dim=mlp_dim) for _ in range(depth - resampler_depth)]
        resampler = PerceiverResampler(
            dim,
            depth=resampler_depth,
            num_latents=num_latents,
            heads=heads,
            head_dim=dim // heads,
            mlp_ratio=mlp_dim / dim,
            num_time_embeddings=1,
        )
        super().__init__(
            TokenEmbedding(dim, image_size=image_size, patch_size=patch_size, channels=channels, stem=stem),
            [*blocks, resampler],
            dim=dim,
            num_classes=num_classes,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "resampler_vit_mini": {**MINI, "num_latents": 8},
    "resampler_vit_small": {**SMALL, "num_latents": 16, "resampler_depth": 4},
}
