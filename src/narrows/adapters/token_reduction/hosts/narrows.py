"""The plain vision transformers of narrows."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.hosts.base import BlockCall, HostModel, unsupported
from narrows.adapters.token_reduction.hosts.parts import Parts, PartsBlock
from narrows.adapters.token_reduction.tokens import kept_mask_of, pool_kept
from narrows.models.base import ImageClassifier
from narrows.models.blocks import Block, FeedForward, SelfAttention
from narrows.models.vit import TransformerClassifier


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is a vision transformer.

    Raises:
        InvalidType: it is a classifier of another kind.
    """
    if not isinstance(module, ImageClassifier):
        return None
    if not isinstance(module, TransformerClassifier):
        raise unsupported("model", module, "a plain vision transformer, blocks one after another")
    return NarrowsModel(module)


class NarrowsModel(HostModel):
    """A vision transformer of narrows that classifies by its class token or by pooled tokens."""

    entries = ("forward", "forward_features")

    def __init__(self, module: TransformerClassifier) -> None:
        embedding = module.embedding
        side = embedding.side * embedding.patch_size
        super().__init__(
            module, blocks=module.blocks, prefix=embedding.prefix, embedding=embedding, image_size=(side, side)
        )

    def block(self, index: int) -> "NarrowsBlock":
        """The block at `index`.

        Raises:
            InvalidType: it is a token bottleneck itself, or holds one.
        """
        block = self.blocks[index]
        if type(block).forward is not Block.forward:
            raise unsupported(f"blocks.{index}", block, "a plain transformer block")
        assert isinstance(block, Block)
        if type(block.feed_forward) is not FeedForward:
            known = "a plain feed-forward, not a mixture of experts"
            raise unsupported(f"blocks.{index}.feed_forward", block.feed_forward, known)
        if type(block.attention) is not SelfAttention:
            raise unsupported(f"blocks.{index}.attention", block.attention, "self-attention")
        return NarrowsBlock(block)

    def reader(self, module: TransformerClassifier, name: str, kwargs: dict[str, Any]) -> str:
        """Features are pooled in either case, so that a class token is all that is read."""
        return "special" if module.global_pool == "token" else "grid"

    def pooling_logits(self, module: TransformerClassifier, tokens: Float[Tensor, "R n D"]) -> Tensor | None:
        """Under max pooling, the channels."""
        return module.norm(tokens) if module.global_pool == "max" else None

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        return ((self.module, "pool"),)

    @property
    def between(self) -> Sequence[nn.Module]:
        return (self.module.norm,)

    def pool(self, module: TransformerClassifier, own: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        """The model's own `pool`, of kept tokens only."""
        kept = kept_mask_of(tokens)
        return own(tokens) if kept is None else pool_kept(tokens, kept, module.global_pool)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.module.embedding.patch_size
        return height // patch, width // patch

    def example(self, batch: int) -> dict[str, Tensor]:
        return {"images": self.random_images(batch, self.module.embedding.channels)}


_PARTS = Parts(
    "attention_norm",
    "attention",
    ("qkv",),
    ("attention.out",),
    ("feed_forward_norm", "feed_forward"),
    heads="heads",
    dropout="dropout",
)


class NarrowsBlock(PartsBlock):
    """One block of the plain transformer."""

    takes_bias = False

    def __init__(self, module: Block) -> None:
        super().__init__(module, _PARTS)

    def arguments(self, tokens: Float[Tensor, "B N D"]) -> BlockCall:
        return BlockCall()

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"] | None
    ) -> Float[Tensor, "R m D"]:
        return nn.functional.dropout(super().attention_update(attended, normed), self.dropout)
