"""What a reduction needs to know of other people's models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidType


class BlockCall(NamedTuple):
    """The arguments that a block was called with, sorted.

    Args:
        grid: `[B, N, D]`, the tokens.
        rotary: `[B or 1, N + 1, H or 1, R]`: what rotates query and key at each position, prefix included; the last
            row is for a token that stands nowhere and rotates by nothing. None without rotary positions.
        bias: `[B or 1, H or 1, N, N]`, boolean or added to the logits; None without an attention mask.
    """

    grid: Float[Tensor, "B N D"]
    rotary: Tensor | None = None
    bias: Tensor | None = None


class QueryKeyValue(NamedTuple):
    """Query, key and value `[R, n, H, d]`, normalised where the host does, not rotated yet."""

    query: Float[Tensor, "R n H d"]
    key: Float[Tensor, "R n H d"]
    value: Float[Tensor, "R n H d"]


class HostBlock(ABC):
    """One transformer block of a model, taken apart: whatever is in it, in these pieces it must be whole again.

    Pieces call the block's own modules, so that hooks, adapters (LoRA) and quantised layers go on working. Rows are
    `[R, n, ...]`, one line for each image or all images in one: nothing in a piece may depend on which.

    Args:
        module: the block.
        scale: what logits of attention are multiplied by.
    """

    def __init__(self, module: nn.Module, *, scale: float) -> None:
        self.module, self.scale = module, scale

    @property
    def dropout(self) -> float:
        """Probability at which attention weights are dropped, 0 in evaluation."""
        return 0.0

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`forward` in the place of the block's own; a host whose blocks checkpoint themselves does so here."""
        return forward(*args, **kwargs)

    @abstractmethod
    def arguments(self, *args: Any, **kwargs: Any) -> BlockCall:
        """What the block was called with; raises for an argument that a reduction cannot honour."""

    def result(self, grid: Float[Tensor, "B N D"]) -> Any:
        """What the block returns."""
        return grid

    def tokens(self, result: Any) -> Float[Tensor, "B N D"]:
        """The tokens in what the block returns."""
        return result

    @abstractmethod
    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        """What attention reads."""

    @abstractmethod
    def query(self, normed: Float[Tensor, "R m D"]) -> Float[Tensor, "R m H d"]:
        """Queries, normalised where the host does, not rotated yet."""

    @abstractmethod
    def key_value(self, normed: Float[Tensor, "R n D"]) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, n, H, d]`, normalised where the host does, not rotated yet."""

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        """All three of the same rows."""
        return QueryKeyValue(self.query(normed), *self.key_value(normed))

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Queries or keys, turned by the rows of `rotary` of their positions, `[R, n, H or 1, R]`."""
        raise NotImplementedError

    @abstractmethod
    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]
    ) -> Float[Tensor, "R m D"]:
        """What attention adds to the tokens: output projection, layer scale, norm, gate; stochastic depth left out."""

    @abstractmethod
    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        """What the feed-forward adds to the tokens; stochastic depth left out."""

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two updates: modules that act on each image, axis 0, for itself."""
        return _KEEP, _KEEP


_KEEP = nn.Identity()


class HostModel(ABC):
    """A vision transformer of another library, recognised.

    Args:
        module: the model.
        blocks: its blocks, in the order they run.
        prefix: tokens before the grid: class token, distillation token, registers.
        embedding: the module that is called with the images, first, and makes tokens of them.
        image_size: `(height, width)` of the images it is made for.
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
        """The block at `index`, taken apart.

        Raises:
            InvalidType: it is of a kind that is not understood.
        """

    def pooling_logits(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """How strongly each of these tokens would be read by what pools, were they the last; None where all are alike.

        Attention pooling asks with one query for each of H heads. Pooling the greatest is attention so sharp that it
        reads a single token, with as many heads as channels.
        """
        return None

    @property
    def readout(self) -> Sequence[tuple[nn.Module, str, Callable[..., Any]]]:
        """Methods that read all tokens of the grid, and those that take their place: `(module, name, function)`.

        Tokens that were dropped early are strangers to what reads the last ones: a mean over them as well loses far
        more than the mean over those that were kept (`carried.kept_in`). Empty where only special tokens are read.
        """
        return ()

    @property
    def between(self) -> Sequence[nn.Module]:
        """Modules that the tokens pass between the last block and the readout."""
        return ()

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` of the grid after the prefix for images of this height and width."""

    @abstractmethod
    def example(self, batch: int) -> dict[str, torch.Tensor]:
        """Random inputs the model can be called with, on its device and in its precision."""


def not_understood(argument: str, module: nn.Module, known: str) -> InvalidType:
    """The error for a part of a model that is nothing known."""
    return InvalidType(
        argument,
        expected=known,
        got=f"{type(module).__module__}.{type(module).__qualname__}, which is not understood",
        hint="What would be needed: a HostBlock that takes it apart (narrows.adapters.token_reduction.hosts.base).",
    )
