"""The tokens that blocks still carry, in padded or packed rows, and the full grid that everything else sees.

A reduced block returns the full grid `[B, N, D]`, as the block it replaces would: carried tokens in place, dropped
ones as they were when they were dropped. So features, intermediates and hidden states need to know nothing of a
reduction. What the next block works on, fewer tokens, is attached to that tensor as an attribute. State thereby belongs
to the tensors of one call: nothing is stored in a module, so that exceptions, threads, several calls before a backward
pass, and the second forward of gradient checkpointing cannot mix it up.

Padded rows have static shapes and trace into one graph; packed rows spend nothing on padding. Both hold the same tokens
in the same order. Norms, projections and feed-forwards act on rows and need not know which it is.
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
        """Row numbers, counted over the batch, of the tokens in these slots of each image."""
        return torch.arange(self.batch, device=slots.device)[:, None] * self.width + slots

    def to_padded(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "B n *rest"]:
        """The rows padded to one length, as they are."""
        return rows

    def to_packed(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The rows that hold a token, one after another."""
        return rows.flatten(0, 1) if self.mask is None else rows[self.mask]

    def per_row(self, values: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "B 1 *rest"]:
        """One value for each image, to be broadcast over its rows."""
        return values[:, None]


@dataclass(frozen=True)
class Packed:
    """Rows `[1, T, ...]`: those of the first image, those of the second, and so on, without padding.

    Args:
        lengths: `[B]` on the CPU, where attention needs them: how many tokens each image has, at least 1.
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
        """`[B, width]`: which entries of `to_padded` are tokens."""
        return (torch.arange(self.width) < self.lengths[:, None]).to(self.device)

    def flat(self, slots: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Row numbers of the tokens in these slots of each image."""
        return (self.lengths.cumsum(0) - self.lengths)[:, None].to(self.device) + slots

    def to_padded(self, rows: Shaped[Tensor, "1 T *rest"]) -> Shaped[Tensor, "B n *rest"]:
        """The rows padded with zeros to `width` for each image."""
        mask = self.mask
        padded = rows.new_zeros(mask.shape + rows.shape[2:])
        padded[mask] = rows[0]
        return padded

    def to_packed(self, rows: Shaped[Tensor, "1 T *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The rows one after another."""
        return rows[0]

    def per_row(self, values: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "1 T *rest"]:
        """One value for each image, repeated for its rows."""
        return values.repeat_interleave(self.lengths.to(self.device), 0)[None]


Layout = Padded | Packed


def select_rows(
    layout: Layout, sample: TokenSample, *, adaptive: bool, pack: bool
) -> tuple[Int[Tensor, "S m"], Layout]:
    """Row numbers, counted over the batch, of the tokens in `sample`, and the layout of these rows alone.

    Args:
        layout: of the rows that the ids of `sample` number for each image.
        sample: tokens, and slots that are padding.
        adaptive: whether there may be padding; it is masked then, or left out.
        pack: leave padding out.

    Returns:
        Row numbers in the shape of the new rows, `[B, K]` or `[1, T]`, and their layout.
    """
    flat = layout.flat(sample.ids)
    if not adaptive:
        return flat, Padded(flat.shape[0], flat.shape[1])
    if not pack:
        return flat, Padded(flat.shape[0], flat.shape[1], sample.mask)
    rows = flat[sample.mask][None]
    if flat.shape[0] == 1:  # a single image needs no padding
        return rows, Padded(1, rows.shape[1])
    return rows, Packed(sample.mask.sum(1).cpu(), rows.device)


def gather_rows(rows: Shaped[Tensor, "R n *rest"], flat: Int[Tensor, "S m"]) -> Shaped[Tensor, "S m *rest"]:
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
    """Scaled dot-product attention of the queries of each image over its own keys.

    Args:
        query: rows of `query_layout`.
        key: rows of `key_layout`.
        value: rows of `key_layout`.
        query_layout: padded or packed.
        key_layout: of keys and values; not packed where the queries are padded.
        scale: what logits are multiplied by.
        bias: `[B, 1 or H, 1 or m, n]`, boolean or added to the logits; padded rows only.
        dropout: probability at which attention weights are dropped.
    """
    if isinstance(query_layout, Packed):
        assert bias is None, "packed rows take no bias"
        if isinstance(key_layout, Packed):
            key_lengths = key_layout.lengths
        else:
            assert key_layout.mask is None, "rows that may be packed are packed at once"
            key_lengths = torch.full_like(query_layout.lengths, key_layout.width)
        return ragged_attention(
            query[0],
            key_layout.to_packed(key),
            key_layout.to_packed(value),
            query_layout.lengths,
            key_lengths,
            scale=scale,
            dropout=dropout,
        )[None]
    assert isinstance(key_layout, Padded), "padded queries read padded keys"
    if key_layout.mask is not None:
        readable = key_layout.mask[:, None, None]
        if bias is None:
            bias = readable
        else:
            bias = bias & readable if bias.dtype == torch.bool else bias.masked_fill(~readable, -torch.inf)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2)


@dataclass(frozen=True)
class TokenState:
    """The tokens that a reduced block passes to the next, and what became of all others.

    Args:
        tokens: `[B, K, D]` or packed `[1, T, D]`.
        layout: padded or packed.
        ids: shaped like the rows: the position in the image of each token, -1 for a fused token, which has none.
        sizes: shaped like the rows: how many tokens of the image were merged into each; None if one each.
        holder: `[B, N]`, the row (counted over the batch) that holds each position now; -1 where it was dropped.
        last: `[B, N, D]`, every position as it was when tokens were last dropped.
    """

    tokens: Float[Tensor, "R n D"]
    layout: Layout
    ids: Int[Tensor, "R n"]
    sizes: Float[Tensor, "R n"] | None
    holder: Int[Tensor, "B N"]
    last: Float[Tensor, "B N D"]

    @staticmethod
    def all_of(grid: Float[Tensor, "B N D"]) -> "TokenState":
        """Every token, none dropped yet."""
        layout = Padded(grid.shape[0], grid.shape[1])
        ids = torch.arange(grid.shape[1], device=grid.device).expand(grid.shape[:2])
        return TokenState(grid, layout, ids, None, layout.flat(ids), grid)

    @property
    def whole(self) -> bool:
        """Whether no token was dropped or merged yet: the rows are the grid."""
        return self.last is self.tokens

    def with_tokens(self, tokens: Float[Tensor, "R n D"]) -> "TokenState":
        """The same with updated tokens."""
        return replace(self, tokens=tokens, last=tokens if self.whole else self.last)

    def kept(
        self, sample: TokenSample, *, adaptive: bool, pack: bool, last: Float[Tensor, "B N D"]
    ) -> tuple["TokenState", Int[Tensor, "S m"]]:
        """The state with these tokens alone, and the rows they had."""
        rows, layout = select_rows(self.layout, sample, adaptive=adaptive, pack=pack)
        numbers = torch.arange(rows.numel(), device=rows.device)
        # A slot that is padding carries the row number of some real token: it scatters to one row beyond the end.
        beyond = self.ids.numel()
        own = rows.where(layout.mask, beyond) if isinstance(layout, Padded) and layout.mask is not None else rows
        into = rows.new_full((beyond + 1,), -1).scatter(0, own.flatten(), numbers)[:beyond]
        sizes = None if self.sizes is None else gather_rows(self.sizes, rows)
        tokens, ids = gather_rows(self.tokens, rows), gather_rows(self.ids, rows)
        return TokenState(tokens, layout, ids, sizes, self._held_by(into), last), rows

    def merged(
        self,
        tokens: Float[Tensor, "B K D"],
        ids: Int[Tensor, "B K"],
        sizes: Float[Tensor, "B K"] | None,
        into: Int[Tensor, "B n"],
    ) -> "TokenState":
        """The state with these tokens instead; slot n was merged into slot `into` of its image, or dropped (-1)."""
        layout = Padded(tokens.shape[0], tokens.shape[1])
        # Positions merged into a fused token, which has no position, count as dropped.
        placed = (into >= 0) & (ids.gather(1, into.clamp_min(0)) >= 0)
        into = layout.flat(into).where(placed, -1)
        return TokenState(tokens, layout, ids, sizes, self._held_by(into.flatten()), self.on_grid())

    def _held_by(self, into: Int[Tensor, "T"]) -> Int[Tensor, "B N"]:
        """The row that holds each position once row r has become row `into[r]`."""
        return into[self.holder.clamp_min(0)].where(self.holder >= 0, -1)

    def on_grid(self) -> Float[Tensor, "B N D"]:
        """Every position of the image: carried tokens in place, dropped ones as they were when dropped."""
        if self.whole:
            return self.tokens
        # One gather of whole rows: `where` would compare every number.
        rows = torch.cat((self.tokens.flatten(0, 1), self.last.flatten(0, 1)))
        own = torch.arange(self.holder.numel(), device=rows.device).view_as(self.holder) + self.ids.numel()
        return gather_rows(rows[None], self.holder.where(self.holder >= 0, own))


_STATE = "narrows_carried"
_KEPT = "narrows_kept"


def attach_state(state: TokenState) -> Float[Tensor, "B N D"]:
    """The full grid, with the state that the next block goes on with attached to it."""
    grid = state.on_grid()
    setattr(grid, _STATE, state)
    return grid


def state_of(grid: Float[Tensor, "B N D"]) -> TokenState | None:
    """The state that the block before attached, or None where `grid` comes from no reduced block."""
    return getattr(grid, _STATE, None)


def attach_kept_mask(state: TokenState) -> Float[Tensor, "B N D"]:
    """The full grid after the last block, with the mask of kept positions, for what averages over tokens, attached."""
    grid = state.on_grid()
    if not state.whole:
        setattr(grid, _KEPT, state.holder >= 0)
    return grid


def kept_mask_of(features: Float[Tensor, "B N D"]) -> Bool[Tensor, "B N"] | None:
    """Which positions were kept through all blocks; None where all were, or where no mask is attached."""
    return getattr(features, _KEPT, None)


def copy_kept_mask(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: the output of a module has the kept mask of its input."""
    kept = kept_mask_of(args[0])
    if kept is not None:
        setattr(output, _KEPT, kept)


def pool_kept(features: Float[Tensor, "B N D"], kept: Bool[Tensor, "B N"], kind: str) -> Float[Tensor, "B D"]:
    """Mean ("avg"), maximum ("max") or the mean of both ("avgmax") over the tokens that were kept."""
    kept = kept[..., None]
    if kind == "max":
        return features.masked_fill(~kept, -torch.inf).amax(1)
    mean = features.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    return mean if kind == "avg" else 0.5 * (mean + pool_kept(features, kept[..., 0], "max"))
