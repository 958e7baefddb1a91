"""The interface through which a reduction runs the blocks of another library's model step by step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidType
from narrows.validation import why_not_plain


class BlockCall(NamedTuple):
    """The arguments that a block was called with, in one form for all libraries.

    Args:
        grid: `[B, N, D]`, the tokens.
        rotary: `[B or 1, N + 1, H or 1, R]`: rotary embeddings of query and key at each position, prefix included; the
            last row, for a fused token without a position, does not rotate. None without rotary positions.
        bias: `[B or 1, H or 1, N, N]`, boolean or added to the logits; None without an attention mask.
    """

    grid: Float[Tensor, "B N D"]
    rotary: Tensor | None = None
    bias: Tensor | None = None


class QueryKeyValue(NamedTuple):
    """Query, key and value `[R, n, H, d]`, after the norms of query and key, before rotary positions."""

    query: Float[Tensor, "R n H d"]
    key: Float[Tensor, "R n H d"]
    value: Float[Tensor, "R n H d"]


class HostBlock(ABC):
    """One transformer block as separate steps, which composed with attention compute what its own `forward` does.

    Steps call the block's own modules, so that hooks, adapters (LoRA) and quantised layers keep working. Rows are
    `[R, n, ...]`, padded (R images) or packed (R = 1): a step treats every row for itself.

    Args:
        module: the block.
        scale: of the attention logits.
    """

    def __init__(self, module: nn.Module, *, scale: float) -> None:
        self.module, self.scale = module, scale

    @property
    def dropout(self) -> float:
        """Dropout probability of attention weights, 0 in evaluation."""
        return 0.0

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward` in place of the block's own; blocks that use activation checkpointing wrap it here."""
        return forward(*args, **kwargs)

    @abstractmethod
    def arguments(self, *args: Any, **kwargs: Any) -> BlockCall:
        """The call's arguments; raises for one that a reduction cannot honour."""

    def result(self, grid: Float[Tensor, "B N D"]) -> Any:
        """What the block returns."""
        return grid

    def tokens(self, result: Any) -> Float[Tensor, "B N D"]:
        """The tokens in what the block returns."""
        return result

    @abstractmethod
    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        """The input of attention: the normalised tokens."""

    @abstractmethod
    def query(self, normed: Float[Tensor, "R m D"]) -> Float[Tensor, "R m H d"]:
        """Queries, after the query norm if the host has one, before rotary positions."""

    @abstractmethod
    def key_value(self, normed: Float[Tensor, "R n D"]) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, n, H, d]`, after the key norm if the host has one, before rotary positions."""

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        """All three of the same rows."""
        return QueryKeyValue(self.query(normed), *self.key_value(normed))

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Queries or keys with the rotary embeddings of their positions, `[R, n, H or 1, R]`, applied."""
        raise NotImplementedError

    @abstractmethod
    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]
    ) -> Float[Tensor, "R m D"]:
        """What attention adds to the tokens: gate, output projection, norm, layer scale; without stochastic depth."""

    @abstractmethod
    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        """What the feed-forward adds to the tokens, without stochastic depth."""

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two updates: modules that keep or drop each image (axis 0)."""
        return _KEEP, _KEEP


_KEEP = nn.Identity()


class HostModel(ABC):
    """A vision transformer of another library.

    Args:
        module: the model.
        blocks: its blocks, in the order they run.
        prefix: tokens before the grid: class token, distillation token, registers.
        embedding: the module that turns images into tokens, called with the images as its first argument.
        image_size: `(height, width)` of the images it was trained on.
        class_token: whether the first token is a class token that the head reads.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Iterable[nn.Module],
        prefix: int,
        embedding: nn.Module,
        image_size: tuple[int, int],
        class_token: bool,
    ) -> None:
        self.module, self.blocks, self.prefix = module, tuple(blocks), prefix
        self.embedding, self.image_size, self.class_token = embedding, image_size, class_token

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens after the prefix, for images of `image_size`."""
        height, width = self.token_grid(*self.image_size)
        return height * width

    @abstractmethod
    def block(self, index: int) -> HostBlock:
        """The block at `index`.

        Raises:
            InvalidType: it is of a class that is not supported.
        """

    def pooling_logits(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """Logits that pooling after the last block would give these tokens; None where it weighs all equally.

        Attention pooling has one query for each of H heads. Max pooling is hard attention with one head for each
        channel: its logits are the channels.
        """
        return None

    @property
    def readout(self) -> Sequence[tuple[nn.Module, str, Callable[..., Any]]]:
        """Methods that pool all tokens of the grid, with their replacements: `(module, name, function)`.

        Replacements pool kept tokens only (`kept_mask_of`): tokens dropped early were never brought to the last block,
        and including them in the mean costs accuracy. Empty where the head reads special tokens only.
        """
        return ()

    @property
    def between(self) -> Sequence[nn.Module]:
        """Modules between the last block and the pooling, through which the mask of kept tokens is passed on."""
        return ()

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` of the grid after the prefix for images of this height and width."""

    @abstractmethod
    def example(self, batch: int) -> dict[str, torch.Tensor]:
        """Random inputs the model can be called with, on its device and in its precision."""


def unsupported(argument: str, module: nn.Module, known: str) -> InvalidType:
    """The error for a part of a model whose class is not supported."""
    return InvalidType(
        argument,
        expected=known,
        got=f"{type(module).__module__}.{type(module).__qualname__}, which is not supported",
        hint="To support it, write a HostBlock (narrows.adapters.token_reduction.hosts.base).",
    )


def linear_part(
    module: nn.Module, rows: Float[Tensor, "*batch D"], start: int, stop: int
) -> Float[Tensor, "*batch out"]:
    """`module(rows)[..., start:stop]`; of a plain `nn.Linear` nothing else is computed."""
    if not isinstance(module, nn.Linear) or why_not_plain((("", module),), kinds=(nn.Linear,)) is not None:
        return module(rows)[..., start:stop]
    return F.linear(rows, module.weight[start:stop], None if module.bias is None else module.bias[start:stop])
