"""A vision transformer that passes its tokens through the slots of slot attention."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from narrows.layers.slot_attention import LearnedSlots, SlotAttention
from narrows.models.parts import Block, TokenEmbedding, TransformerClassifier
from narrows.models.vit import MINI, SMALL
from narrows.validation import check_positive


class SlotBottleneck(nn.Module):
    """Tokens `[B, N, dim]` to slots `[B, num_slots, dim]`.

    The slots start from learned vectors, so that a classifier is deterministic; the published Gaussian start is
    `SlotAttention`'s own default.
    """

    def __init__(self, dim: int, *, num_slots: int, num_iterations: int) -> None:
        super().__init__()
        self.slot_attention = SlotAttention(
            dim, num_slots=num_slots, num_iterations=num_iterations, initial_slots=LearnedSlots(num_slots, dim)
        )

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K D"]:
        """The slots after the last iteration."""
        return self.slot_attention(tokens).slots


class SlotViT(TransformerClassifier):
    """A vision transformer whose last blocks run on slots (Locatello et al. 2020) instead of tokens.

    Args:
        slot_depth: how many of the `depth` blocks come after the bottleneck, on slots.
        num_slots: slots that carry the image from there on.
        num_iterations: iterations of slot attention.

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
        slot_depth: int = 1,
        num_slots: int = 8,
        num_iterations: int = 3,
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim, num_slots=num_slots)
        blocks: list[nn.Module] = [Block(dim, heads=heads, mlp_dim=mlp_dim) for _ in range(depth)]
        blocks.insert(depth - slot_depth, SlotBottleneck(dim, num_slots=num_slots, num_iterations=num_iterations))
        super().__init__(
            TokenEmbedding(dim, image_size=image_size, patch_size=patch_size, channels=channels, stem=stem),
            blocks,
            dim=dim,
            num_classes=num_classes,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "slot_vit_mini": {**MINI, "num_slots": 8},
    "slot_vit_small": {**SMALL, "num_slots": 16, "slot_depth": 4},
}
