"""The plain vision transformer: the baseline everything else is compared with."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from narrows.models.parts import Block, TokenEmbedding, TransformerClassifier
from narrows.validation import check_positive


class ViT(TransformerClassifier):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) with mean pooling (Beyer et al. 2022).

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
        class_token: read a class token instead of the mean over all tokens.
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
        class_token: bool = False,
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim)
        super().__init__(
            TokenEmbedding(
                dim,
                image_size=image_size,
                patch_size=patch_size,
                channels=channels,
                stem=stem,
                class_token=class_token,
            ),
            (Block(dim, heads=heads, mlp_dim=mlp_dim, dropout=dropout) for _ in range(depth)),
            dim=dim,
            num_classes=num_classes,
        )

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The class token after the last block, or the mean of all tokens, normalised: `[B, dim]`."""
        tokens = self.blocks(self.embedding(images))
        return self.norm(tokens).mean(1) if self.embedding.class_token is None else self.norm(tokens[:, 0])


MINI: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_classes": 10, "channels": 3, "stem": "conv",
    "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_classes": 1000, "channels": 3, "stem": "patch",
    "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536,
}  # fmt: skip

PRESETS = {"vit_mini": MINI, "vit_small": SMALL}
