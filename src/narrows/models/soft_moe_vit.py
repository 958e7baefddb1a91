"""A vision transformer whose later feed-forwards are soft mixtures of experts."""

from typing import Any

from narrows.layers.soft_moe import SoftMoE
from narrows.models.parts import Block, TokenEmbedding, TransformerClassifier
from narrows.models.vit import MINI, SMALL
from narrows.validation import check_positive


class SoftMoEViT(TransformerClassifier):
    """The plain vision transformer with `SoftMoE` in the last half of its blocks (Puigcerver et al. 2023, section 3).

    Args:
        num_experts: experts of each mixture.
        slots_per_expert: slots of each expert; the experts read `num_experts * slots_per_expert` slots, however many
            tokens there are.

    The other arguments are those of `ViT`; `mlp_dim` is the hidden width of the plain blocks and of every expert.
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
        num_experts: int,
        slots_per_expert: int = 1,
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim)

        def block(index: int) -> Block:
            if index < depth // 2:
                return Block(dim, heads=heads, mlp_dim=mlp_dim)
            mixture = SoftMoE(
                dim, num_experts=num_experts, slots_per_expert=slots_per_expert, expert_mult=mlp_dim / dim
            )
            return Block(dim, heads=heads, mlp_dim=mlp_dim, feed_forward=mixture)

        super().__init__(
            TokenEmbedding(dim, image_size=image_size, patch_size=patch_size, channels=channels, stem=stem),
            map(block, range(depth)),
            dim=dim,
            num_classes=num_classes,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "soft_moe_vit_mini": {**MINI, "num_experts": 8, "slots_per_expert": 2},
    "soft_moe_vit_small": {**SMALL, "num_experts": 128},
}
