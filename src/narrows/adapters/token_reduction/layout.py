"""How the rows of a batch lie in memory: padded to one length, or packed without padding.

Both hold the same tokens in the same order. Padded rows have static shapes and trace into one graph; packed rows spend
nothing on slots that hold no token. Norms, projections and feed-forwards act on rows and need not know which it is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.ragged_attention import ragged_attention
from narrows.ops.token_sampling import TokenSample


@dataclass(frozen=True)
class Padded:
    """Rows `[B, n, ...]`: as many for every image.

    Args:
        batch: B.
        width: n.
        mask: `[B, n]`, True at rows that hold a token; None if all do.
    """

    batch: int
    width: int
    mask: Bool[Tensor, "B n"] | None = None

    def flat(self, slots: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Which row, counted over the whole batch, holds the token in each of these slots of each image."""
        return torch.arange(self.batch, device=slots.device)[:, None] * self.width + slots

    def lines(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "B n *rest"]:
        """The rows as one line for each image."""
        return rows

    def packed(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The rows that hold a token, one after another."""
        return rows.flatten(0, 1) if self.mask is None else rows[self.mask]

    def spread(self, values: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "B 1 *rest"]:
        """One value for each image as one for each of its rows, ready to be broadcast."""
        return values[:, None]


@dataclass(frozen=True)
class Packed:
    """Rows `[1, T, ...]`: those of the first image, those of the second, and so on, without a gap.

    Args:
        lengths: `[B]` on the CPU, where attention asks for them: how many tokens each image has, at least 1.
        device: where the rows are.
    """

    lengths: Int[Tensor, "B"]
    device: torch.device

    @property
    def batch(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def width(self) -> int:
        """The greatest number of tokens."""
        return int(self.lengths.max())

    @property
    def mask(self) -> Bool[Tensor, "B n"]:
        """`[B, width]`: which entries of `lines` are tokens."""
        return (torch.arange(self.width) < self.lengths[:, None]).to(self.device)

    def flat(self, slots: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Which row holds the token in each of these slots of each image."""
        return (self.lengths.cumsum(0) - self.lengths)[:, None].to(self.device) + slots

    def lines(self, rows: Shaped[Tensor, "1 T *rest"]) -> Shaped[Tensor, "B n *rest"]:
        """The rows as one line for each image, `width` long, 0 where there is no token."""
        mask = self.mask
        lines = rows.new_zeros(mask.shape + rows.shape[2:])
        lines[mask] = rows[0]
        return lines

    def packed(self, rows: Shaped[Tensor, "1 T *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The rows one after another."""
        return rows[0]

    def spread(self, values: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "1 T *rest"]:
        """One value for each image as one for each of its rows."""
        return values.repeat_interleave(self.lengths.to(self.device), 0)[None]


Layout = Padded | Packed


def taken(layout: Layout, sample: TokenSample, *, adaptive: bool, pack: bool) -> tuple[Int[Tensor, "S m"], Layout]:
    """Which rows of `layout`, counted over the batch, hold the tokens of `sample`, and how they lie when taken.

    Args:
        layout: of the rows that the ids of `sample` number for each image.
        sample: tokens and the slots that hold none.
        adaptive: whether there may be slots that hold none; they are masked then, or packed away.
        pack: leave no slot empty.

    Returns:
        Row numbers in the shape of the new rows, `[B, K]` or `[1, T]`, and their layout.
    """
    flat = layout.flat(sample.ids)
    if not adaptive:
        return flat, Padded(flat.shape[0], flat.shape[1])
    if not pack:
        return flat, Padded(flat.shape[0], flat.shape[1], sample.mask)
    rows = flat[sample.mask][None]
    if flat.shape[0] == 1:  # one image alone is packed as it lies
        return rows, Padded(1, rows.shape[1])
    return rows, Packed(sample.mask.sum(1).cpu(), rows.device)


def pick(rows: Shaped[Tensor, "R n *rest"], flat: Int[Tensor, "S m"]) -> Shaped[Tensor, "S m *rest"]:
    """The rows with these numbers, counted over the batch."""
    return rows.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, flat.shape)


def attend(
    query: Float[Tensor, "R m H d"],
    key: Float[Tensor, "S n H d"],
    value: Float[Tensor, "S n H d"],
    query_layout: Layout,
    key_layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "R m H d"]:
    """Attention of the queries of each image over its own keys.

    Args:
        query: rows of `query_layout`.
        key: rows of `key_layout`.
        value: rows of `key_layout`.
        query_layout: how the queries lie.
        key_layout: how keys and values lie; not packed where the queries are padded.
        scale: what logits are multiplied by.
        bias: `[B, 1 or H, 1 or m, n]`, boolean or added to the logits; padded rows only.
        dropout: probability at which attention weights are dropped.
    """
    if isinstance(query_layout, Packed):
        assert bias is None, "packed rows take no bias"
        key_lengths = key_layout.lengths if isinstance(key_layout, Packed) else _lengths(key_layout, query_layout)
        return ragged_attention(
            query[0],
            key_layout.packed(key),
            key_layout.packed(value),
            query_layout.lengths,
            key_lengths,
            scale=scale,
            dropout=dropout,
        )[None]
    assert isinstance(key_layout, Padded), "padded queries read padded keys"
    if key_layout.mask is not None:
        readable = key_layout.mask[:, None, None]
        bias = readable if bias is None else _also(bias, readable)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2)


def _lengths(keys: Padded, queries: Packed) -> Int[Tensor, "B"]:
    assert keys.mask is None, "rows that may be packed are packed at once"
    return torch.full_like(queries.lengths, keys.width)


def _also(bias: Tensor, readable: Tensor) -> Tensor:
    return bias & readable if bias.dtype == torch.bool else bias.masked_fill(~readable, -torch.inf)
