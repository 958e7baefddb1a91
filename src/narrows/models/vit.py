"""The plain vision transformer: the baseline everything else is compared with."""

from typing import Any

from narrows.models.parts import Block, TokenEmbedding, TransformerClassifier
from narrows.validation import check_positive


class ViT(TransformerClassifier):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), by default mean-pooled (Beyer et al. 2022).

    Args:
        image_size: side of the images the positions are learned on; other sizes interpolate them.
        patch_size: side of a patch.
        num_classes: width of the logits.
        channels: channels of the images.
        stem: "patch" or "conv", see `TokenEmbedding`.
        dim: token width.
        depth: number of blocks.
        heads: attention heads, a divisor of `dim`.
        mlp_dim: hidden width of the feed-forward.
        dropout: in the feed-forward.
        global_pool: what the head reads: the mean of all tokens ("avg"), in each channel the greatest ("max"), which
            finds what is small in a large image, or a class token ("token").
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
        dropout: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim)
        super().__init__(
            TokenEmbedding(
                dim,
                image_size=image_size,
                patch_size=patch_size,
                channels=channels,
                stem=stem,
                class_token=global_pool == "token",
            ),
            (Block(dim, heads=heads, mlp_dim=mlp_dim, dropout=dropout) for _ in range(depth)),
            dim=dim,
            num_classes=num_classes,
            global_pool=global_pool,
        )


MINI: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_classes": 10, "channels": 3, "stem": "conv",
    "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_classes": 1000, "channels": 3, "stem": "patch",
    "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536,
}  # fmt: skip

PRESETS = {"vit_mini": MINI, "vit_small": SMALL}
