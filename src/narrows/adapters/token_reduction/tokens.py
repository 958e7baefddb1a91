"""The tokens that blocks still carry, and the full grid that everyone else sees.

A reduced block hands on the full grid `[B, N, D]`, as the block it replaces would: carried tokens in place, dropped
ones in the last state they had. So features, intermediates and hidden states need know nothing of a reduction. What the
next block works on, fewer tokens, travels with that tensor as an attribute. State thereby belongs to the tensors of one
call: nothing is stored in a module, so that exceptions, threads, several calls before a backward pass, and the second
run of gradient checkpointing cannot mix it up.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
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


_ATTRIBUTE = "narrows_carried"
_KEPT = "narrows_kept"


@dataclass(frozen=True)
class Carried:
    """Tokens on their way through the blocks.

    Args:
        tokens: `[B, K, D]` or packed `[1, T, D]`.
        layout: how they lie.
        ids: shaped like the rows: the position in the image of each token, -1 for one that stands nowhere.
        sizes: shaped like the rows: how many tokens of the image each stands for; None if one each.
        holder: `[B, N]`, which row (counted over the batch) holds each position now; -1 where it was dropped.
        last: `[B, N, D]`, every position as it was when tokens were last dropped.
    """

    tokens: Float[Tensor, "R n D"]
    layout: Layout
    ids: Int[Tensor, "R n"]
    sizes: Float[Tensor, "R n"] | None
    holder: Int[Tensor, "B N"]
    last: Float[Tensor, "B N D"]

    @staticmethod
    def all_of(grid: Float[Tensor, "B N D"]) -> "Carried":
        """Every token, none dropped yet."""
        layout = Padded(grid.shape[0], grid.shape[1])
        ids = torch.arange(grid.shape[1], device=grid.device).expand(grid.shape[:2])
        return Carried(grid, layout, ids, None, layout.flat(ids), grid)

    @property
    def whole(self) -> bool:
        """Whether nothing was taken away yet: the rows are the grid."""
        return self.last is self.tokens

    def with_tokens(self, tokens: Float[Tensor, "R n D"]) -> "Carried":
        """The same tokens in a new state."""
        return replace(self, tokens=tokens, last=tokens if self.whole else self.last)

    def kept(
        self, sample: TokenSample, *, adaptive: bool, pack: bool, last: Float[Tensor, "B N D"]
    ) -> tuple["Carried", Int[Tensor, "S m"]]:
        """These tokens alone, the others dropped, and the rows they had."""
        rows, layout = taken(self.layout, sample, adaptive=adaptive, pack=pack)
        numbers = torch.arange(rows.numel(), device=rows.device)
        # Slots without a token name a row that is another's; they write one row beyond the end.
        beyond = self.ids.numel()
        own = rows.where(layout.mask, beyond) if isinstance(layout, Padded) and layout.mask is not None else rows
        into = rows.new_full((beyond + 1,), -1).scatter(0, own.flatten(), numbers)[:beyond]
        sizes = None if self.sizes is None else pick(self.sizes, rows)
        kept = Carried(pick(self.tokens, rows), layout, pick(self.ids, rows), sizes, self._held_by(into), last)
        return kept, rows

    def merged(
        self,
        tokens: Float[Tensor, "B K D"],
        ids: Int[Tensor, "B K"],
        sizes: Float[Tensor, "B K"] | None,
        into: Int[Tensor, "B n"],
    ) -> "Carried":
        """These tokens instead; slot n goes into slot `into` of its image, or is dropped (-1)."""
        layout = Padded(tokens.shape[0], tokens.shape[1])
        # What goes into a token that stands nowhere stands nowhere itself from now on.
        stands = (into >= 0) & (ids.gather(1, into.clamp_min(0)) >= 0)
        into = layout.flat(into).where(stands, -1)
        return Carried(tokens, layout, ids, sizes, self._held_by(into.flatten()), self.on_grid())

    def _held_by(self, into: Int[Tensor, "T"]) -> Int[Tensor, "B N"]:
        """Which row holds each position once row r has become row `into[r]`."""
        return into[self.holder.clamp_min(0)].where(self.holder >= 0, -1)

    def on_grid(self) -> Float[Tensor, "B N D"]:
        """Every position of the image: carried tokens in place, dropped ones in their last state."""
        if self.whole:
            return self.tokens
        # One copy of whole rows: `where` would look at every number.
        rows = torch.cat((self.tokens.flatten(0, 1), self.last.flatten(0, 1)))
        own = torch.arange(self.holder.numel(), device=rows.device).view_as(self.holder) + self.ids.numel()
        return pick(rows[None], self.holder.where(self.holder >= 0, own))


def hand_on(carried: Carried) -> Float[Tensor, "B N D"]:
    """The full grid, with what the next block carries attached to it."""
    grid = carried.on_grid()
    setattr(grid, _ATTRIBUTE, carried)
    return grid


def received(grid: Float[Tensor, "B N D"]) -> Carried | None:
    """What the block before carried, or None where `grid` comes from no reduced block."""
    return getattr(grid, _ATTRIBUTE, None)


def hand_out(carried: Carried) -> Float[Tensor, "B N D"]:
    """The full grid after the last block, with what a mean over tokens must know: which of them were carried so far."""
    grid = carried.on_grid()
    if not carried.whole:
        setattr(grid, _KEPT, carried.holder >= 0)
    return grid


def kept_in(features: Float[Tensor, "B N D"]) -> Bool[Tensor, "B N"] | None:
    """Which positions were carried through all blocks; None where all were, or nothing is known."""
    return getattr(features, _KEPT, None)


def pass_on(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: what is known of the tokens a module was given holds of those it returns."""
    kept = kept_in(args[0])
    if kept is not None:
        setattr(output, _KEPT, kept)


def pooled(features: Float[Tensor, "B N D"], kept: Bool[Tensor, "B N"], kind: str) -> Float[Tensor, "B D"]:
    """Mean ("avg"), greatest ("max") or half of both ("avgmax") of the tokens that were kept."""
    kept = kept[..., None]
    if kind == "max":
        return features.masked_fill(~kept, -torch.inf).amax(1)
    mean = features.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    return mean if kind == "avg" else 0.5 * (mean + pooled(features, kept[..., 0], "max"))
