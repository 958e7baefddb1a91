"""Blocks described by the names of their parts: what most vision transformers differ in is what they call them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.hosts.base import HostBlock, QueryKeyValue
from narrows.adapters.token_reduction.tokens import kept_mask_of


class Parts(NamedTuple):
    """Where a block keeps what it computes with, as paths from the block. A path may lead to None: nothing is done.

    Args:
        norm: before attention; none if empty.
        attention: the module that attends.
        qkv: in it, one linear map or three; a parameter is a weight, whose bias has `bias` in the place of `weight`.
        update: what attended tokens pass one after another before they are added: modules, or factors.
        feed_forward: likewise, from the tokens to what is added to them.
        heads: how many, in `attention`.
        qk_norm: in `attention`, norms of query and key; none if empty.
        norm_heads: whether these norms come after the heads are taken apart.
        scale: factor of the logits, in `attention`; one over the root of the heads' width if empty.
        dropout: probability for attention weights, or the module that has it, in `attention`.
        drop_path: stochastic depth of both updates, where the block has it.
    """

    norm: str
    attention: str
    qkv: tuple[str, ...]
    update: tuple[str, ...]
    feed_forward: tuple[str, ...]
    heads: str = "num_heads"
    qk_norm: tuple[str, ...] = ()
    norm_heads: bool = True
    scale: str = ""
    dropout: str = "attn_drop"
    drop_path: str = "drop_path"


def part_of(block: Any, path: str) -> Any:
    """What is at a path from the block; None where there is nothing."""
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


class PartsBlock(HostBlock):
    """A block taken apart by the names of its parts.

    Args:
        module: the block.
        parts: their names.
    """

    def __init__(self, module: Any, parts: Parts) -> None:
        super().__init__(module)
        self.parts = parts

    @property
    def attention(self) -> Any:
        """The module that attends."""
        return part_of(self.module, self.parts.attention)

    @property
    def _heads(self) -> int:
        return part_of(self.attention, self.parts.heads)

    @property
    def scale(self) -> float | None:
        return getattr(self.attention, self.parts.scale) if self.parts.scale else None

    @property
    def dropout(self) -> float:
        dropout = getattr(self.attention, self.parts.dropout)
        return getattr(dropout, "p", dropout) if self.attention.training else 0.0

    @property
    def bypassed(self) -> Sequence[nn.Module]:
        """What holds a module that the steps call, and dropout inside attention."""
        parts, attention = self.parts, self.parts.attention
        called = [parts.norm, *parts.update, *parts.feed_forward, *(f"{attention}.{name}" for name in parts.qkv)]
        holders = {".".join(path.split(".")[:depth]) for path in called for depth in range(1, path.count(".") + 1)}
        modules = [part_of(self.module, path) for path in sorted(holders)]
        dropout = getattr(self.attention, parts.dropout)
        return [*modules, dropout] if isinstance(dropout, nn.Module) else modules

    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        return self._through((self.parts.norm,), tokens)

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        parts, attention = self.parts, self.attention
        rows = [self._mapped(attention, name, normed) for name in parts.qkv]
        query, key, value = rows if len(rows) == 3 else rows[0].chunk(3, -1)
        norms = [getattr(attention, name) for name in parts.qk_norm]
        if norms and not parts.norm_heads:
            query, key = norms[0](query), norms[1](key)
        query, key, value = (each.unflatten(-1, (self._heads, -1)) for each in (query, key, value))
        if norms and parts.norm_heads:
            query, key = norms[0](query), norms[1](key)
        return QueryKeyValue(query, key, value)

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"] | None
    ) -> Float[Tensor, "R m D"]:
        return self._through(self.parts.update, attended)

    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        return self._through(self.parts.feed_forward, tokens)

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two updates, which share one module."""
        drop_path = getattr(self.module, self.parts.drop_path, None)
        return super().drop_paths() if drop_path is None else (drop_path, drop_path)

    def _through(self, path: Sequence[str], tokens: Tensor) -> Tensor:
        for name in path:
            part = part_of(self.module, name)
            if part is not None:
                tokens = part(tokens) if isinstance(part, nn.Module) else part * tokens
        return tokens

    @staticmethod
    def _mapped(attention: nn.Module, name: str, tokens: Tensor) -> Tensor:
        part: Any = getattr(attention, name)
        if isinstance(part, nn.Module):
            return part(tokens)
        return F.linear(tokens, part, getattr(attention, name.replace("weight", "bias")))


def half_rotary_rows(
    cosine: Float[Tensor, "N R"], sine: Float[Tensor, "N R"], width: int, still: float = 1.0
) -> Float[Tensor, "1 M 1 2*R"]:
    """Cosines beside sines for prefix, grid, and fused tokens; where there is no position `still` beside 0."""
    around = (0, 0, width - len(cosine), 1)
    return torch.cat((F.pad(cosine, around, value=still), F.pad(sine, around)), -1)[None, :, None]


def rotate_by_halves(heads: Float[Tensor, "R n H d"], rotary: Float[Tensor, "S n 1 r"]) -> Float[Tensor, "R n H d"]:
    """Queries or keys with rotary embeddings applied that pair the first half of a head with the second."""
    cosine, sine = rotary.chunk(2, -1)
    first, second = heads.chunk(2, -1)
    return (heads * cosine + torch.cat((-second, first), -1) * sine).to(heads.dtype)


def pool_by_attention(own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """Attention pooling by `nn.MultiheadAttention`, over kept tokens only."""
    kept = kept_mask_of(key)
    if kept is not None:
        kwargs["key_padding_mask"] = key.new_zeros(kept.shape).masked_fill(~kept, -torch.inf)
    return own(query, key, value, **kwargs)
