"""What a method may look at in one block."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.adapters.token_reduction.layout import Layout
from narrows.ops.token_sampling import significance
from narrows.precision import at_least_float32, autocast_off


@dataclass(frozen=True)
class Signals:
    """One block's tokens, one line of n for each image; everything is worked out when it is asked for.

    A method is asked without gradients: a choice has none, the tokens that were chosen have.

    Args:
        rows: tokens, keys and values `[R, n, ...]` as they lie in memory. Keys are not rotated: they compare contents.
        layout: how they lie.
        reading: gives `[B, H or 1, n]`, see `attention`.
        prefix: P, how many tokens stand before the grid; they are always kept.
        positions: how many tokens the image had after the prefix before any were dropped.
        row_sizes: how many tokens of the image each row stands for; None if one each.
        training: whether the model trains; only then may a choice be random.
        generator: source of randomness; None takes torch's global one.
    """

    rows: tuple[Tensor, Tensor, Tensor]
    layout: Layout
    reading: Callable[[], Float[Tensor, "B G n"]]
    prefix: int
    positions: int
    row_sizes: Float[Tensor, "R n"] | None = None
    training: bool = False
    generator: torch.Generator | None = None

    @property
    def tokens(self) -> Float[Tensor, "B n D"]:
        """The tokens as they come into the block."""
        return self.layout.lines(self.rows[0])

    @property
    def keys(self) -> Float[Tensor, "B n H d"]:
        """What attention compares queries with, before rotary positions."""
        return self.layout.lines(self.rows[1])

    @property
    def values(self) -> Float[Tensor, "B n H d"]:
        """What attention reads."""
        return self.layout.lines(self.rows[2])

    @property
    def sizes(self) -> Float[Tensor, "B n"] | None:
        """How many tokens of the image each token stands for; None if one each."""
        return None if self.row_sizes is None else self.layout.lines(self.row_sizes)

    @property
    def mask(self) -> Bool[Tensor, "B n"] | None:
        """True at tokens; None if all are."""
        return self.layout.mask

    @property
    def grid_mask(self) -> Bool[Tensor, "B m"] | None:
        """`mask` of the tokens after the prefix."""
        return None if self.mask is None else self.mask[:, self.prefix :]

    @property
    def attention(self) -> Float[Tensor, "B G n"]:
        """The attention each token gets from whoever reads the image, float32 or better; 0 where there is no token.

        By head: the class token's row, or, where the head reads no class token, the mean over the rows of all queries.
        Where a query or a maximum pools, its row (`HostModel.pooling_logits`), the mean over its heads, or channels.
        """
        return self.reading()

    @property
    def significance(self) -> Float[Tensor, "B m"]:
        """Attention times the norm of the value, summed over heads, of the tokens after the prefix; rows sum to 1."""
        with autocast_off(self.rows[2]):
            norms = torch.linalg.vector_norm(at_least_float32(self.rows[2]), dim=-1)
        norms = self.layout.lines(norms).transpose(1, 2)
        attention = self.attention.expand_as(norms)
        return significance(attention[..., self.prefix :], norms[..., self.prefix :], self.grid_mask)
