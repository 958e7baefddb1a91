"""The plain vision transformers of narrows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.hosts.base import (
    BlockCall,
    HostBlock,
    HostModel,
    QueryKeyValue,
    linear_part,
    unsupported,
)
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

    module: TransformerClassifier

    def __init__(self, module: TransformerClassifier) -> None:
        embedding = module.embedding
        side = embedding.side * embedding.patch_size
        super().__init__(
            module,
            blocks=module.blocks,
            prefix=embedding.prefix,
            embedding=embedding,
            image_size=(side, side),
            class_token=embedding.class_token is not None,
        )

    def block(self, index: int) -> "NarrowsBlock":
        """The block at `index`.

        Raises:
            InvalidType: it is a token bottleneck itself, or holds one.
        """
        block = self.blocks[index]
        if type(block) is not Block:
            raise unsupported(f"blocks.{index}", block, "a plain transformer block")
        if type(block.feed_forward) is not FeedForward:
            known = "a plain feed-forward, not a mixture of experts"
            raise unsupported(f"blocks.{index}.feed_forward", block.feed_forward, known)
        if type(block.attention) is not SelfAttention:
            raise unsupported(f"blocks.{index}.attention", block.attention, "self-attention")
        return NarrowsBlock(block)

    def pooling_logits(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"] | None:
        """Under max pooling, the channels."""
        return self.module.norm(tokens) if self.module.global_pool == "max" else None

    @property
    def readout(self) -> Sequence[tuple[nn.Module, str, Callable[..., Any]]]:
        """`pool`, unless the class token is read."""
        return () if self.class_token else ((self.module, "pool", self.pool),)

    @property
    def between(self) -> Sequence[nn.Module]:
        return (self.module.norm,)

    def pool(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """The model's own `pool`, of kept tokens only."""
        kept = kept_mask_of(tokens)
        if kept is None:
            return type(self.module).pool(self.module, tokens)
        return pool_kept(tokens, kept, self.module.global_pool)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.module.embedding.patch_size
        return height // patch, width // patch

    def example(self, batch: int) -> dict[str, Tensor]:
        embedding = self.module.embedding
        return {"images": torch.randn(batch, embedding.channels, *self.image_size).to(embedding.positions)}


class NarrowsBlock(HostBlock):
    """One block of the plain transformer."""

    module: Block

    def __init__(self, module: Block) -> None:
        assert isinstance(module.attention, SelfAttention)
        self._attention = module.attention
        width = self._attention.out.in_features // self._attention.heads
        super().__init__(module, scale=width**-0.5)

    @property
    def dropout(self) -> float:
        return self._attention.dropout if self.module.training else 0.0

    def arguments(self, tokens: Float[Tensor, "B N D"]) -> BlockCall:
        return BlockCall(tokens)

    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        return self.module.attention_norm(tokens)

    def query(self, normed: Float[Tensor, "R m D"]) -> Float[Tensor, "R m H d"]:
        (query,) = self._projected(normed, 0, 1)
        return query

    def key_value(self, normed: Float[Tensor, "R n D"]) -> tuple[Tensor, Tensor]:
        key, value = self._projected(normed, 1, 3)
        return key, value

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        return QueryKeyValue(*self._projected(normed, 0, 3))

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]
    ) -> Float[Tensor, "R m D"]:
        return nn.functional.dropout(self._attention.out(attended), self.dropout)

    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        return self.module.feed_forward(self.module.feed_forward_norm(tokens))

    def _projected(self, normed: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Numbers `first` to `last - 1` of query, key and value."""
        width = self._attention.out.in_features
        rows = linear_part(self._attention.qkv, normed, first * width, last * width)
        return rows.unflatten(-1, (last - first, self._attention.heads, -1)).unbind(-3)
