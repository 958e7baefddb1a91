"""The tokens that blocks still carry, in padded or packed rows, and how the full grid is made of them again.

Between blocks tokens travel reduced. What became of the others, a `TokenState`, is attached to the tensor that a block
returns: state belongs to the tensors of one call and to no module, so that exceptions, threads, replicas, several calls
before a backward pass, and the second forward of activation checkpointing cannot mix it up.

Padded rows have static shapes and trace into one graph; packed rows spend nothing on padding. Both hold the same tokens
in the same order. Norms, projections and feed-forwards act on rows and need not know which it is.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from narrows.ops.ragged_attention import ragged_attention
from narrows.precision import is_transformed


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

    @property
    def shape(self) -> tuple[int, int]:
        """Of the rows."""
        return self.batch, self.width

    def to_padded(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "B n *rest"]:
        """The rows padded to one length, as they are."""
        return rows

    def to_packed(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The rows that hold a token, one after another."""
        return rows.flatten(0, 1) if self.mask is None else rows[self.mask]

    def per_row(self, values: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "B 1 *rest"]:
        """One value for each image, to be broadcast over its rows."""
        return values[:, None]

    def starts(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """The number, counted over the batch, of the first row of each image."""
        return torch.arange(self.batch, device=device)[:, None] * self.width

    def first(self, rows: Shaped[Tensor, "B n *rest"]) -> Shaped[Tensor, "B *rest"]:
        """The first row of each image."""
        return rows[:, 0]


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
    def shape(self) -> tuple[int, int]:
        """Of the rows."""
        return 1, int(self.lengths.sum())

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

    def starts(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """The number of the first row of each image."""
        return (self.lengths.cumsum(0) - self.lengths)[:, None].to(device)

    def first(self, rows: Shaped[Tensor, "1 T *rest"]) -> Shaped[Tensor, "B *rest"]:
        """The first row of each image."""
        return rows[0, self.starts(rows.device)[:, 0]]


Layout = Padded | Packed


def gather_rows(rows: Shaped[Tensor, "B n *rest"], ids: Int[Tensor, "B m"]) -> Shaped[Tensor, "B m *rest"]:
    """The rows at positions `ids` of their image."""
    if rows.device.type != "cpu" or rows.shape[0] == 0:
        index = ids.reshape(*ids.shape, *(1,) * (rows.ndim - 2))
        return rows.gather(1, index.expand(-1, -1, *rows.shape[2:]))
    # There, whole rows are copied quicker than entries are looked up.
    flat = ids + torch.arange(rows.shape[0])[:, None] * rows.shape[1]
    return rows.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, ids.shape)


@dataclass(frozen=True)
class Kept:
    """What a block that chose tokens did: `restore` puts them back among those it had.

    Args:
        rows: `[B, K]`, the numbers of the kept tokens in their image; `[1, T]`, counted over the batch, if those that
            went on are packed. Tokens after these K, if any, come from no single token.
        before: layout of the tokens that came in.
        after: layout of those that went on.
    """

    rows: Int[Tensor, "B K"]
    before: Layout
    after: Layout

    def gather(self, rows: Shaped[Tensor, "R n *rest"]) -> Shaped[Tensor, "S m *rest"]:
        """The rows of the tokens that went on."""
        if isinstance(self.after, Packed):
            return rows.flatten(0, 1)[self.rows]
        return gather_rows(rows, self.rows)

    def restore(
        self, values: Shaped[Tensor, "S m *rest"], fill: Shaped[Tensor, "R n *rest"]
    ) -> Shaped[Tensor, "R n *rest"]:
        """`fill`, with the rows of the tokens that went on replaced by `values`."""
        values, after = values[:, : self.rows.shape[1]].to(fill.dtype), self.after
        if isinstance(after, Packed):
            return fill.flatten(0, 1).index_copy(0, self.rows[0], values[0]).view_as(fill)
        rows = self.rows
        if after.mask is not None:  # slots that hold no token go to one row more, which is cut off
            rows = rows.where(after.mask, fill.shape[1])
            fill = torch.cat((fill, fill[:, :1]), 1)
        index = rows.reshape(*rows.shape, *(1,) * (fill.ndim - 2)).expand_as(values)
        restored = fill.scatter(1, index, values)
        return restored if after.mask is None else restored[:, :-1]


@dataclass(frozen=True)
class Merged:
    """What a block that merged tokens did: `restore` copies each new token to all positions merged into it.

    Args:
        into: n to `[B, n]`, the new token that each token went into.
        placed: `[B, n]`, whether it is there; not if it was dropped, or fused into a token without a position. None if
            all are.
        rows: `[B, K']`, the token whose position each of the first K' new tokens keeps, n for one without.
        before: layout of the tokens that came in.
        after: layout of the new tokens.
    """

    into: Callable[[int], Int[Tensor, "B n"]]
    placed: Bool[Tensor, "B n"] | None
    rows: Int[Tensor, "B J"]
    before: Padded
    after: Padded

    def restore(
        self, values: Shaped[Tensor, "B K *rest"], fill: Shaped[Tensor, "B n *rest"]
    ) -> Shaped[Tensor, "B n *rest"]:
        """`values` at all positions merged into them, `fill` at the others."""
        copied = gather_rows(values, self.into(self.before.width)).to(fill.dtype)
        if self.placed is None:
            return copied
        return torch.where(self.placed.reshape(*self.placed.shape, *(1,) * (fill.ndim - 2)), copied, fill)


Step = Kept | Merged


@dataclass(frozen=True)
class Call:
    """What is known of a call of the model before its first block.

    Args:
        reader: who reads the tokens: "blocks", each block's output (intermediates); "grid", all positions after the
            last block; "special", nothing but special tokens after the last block.
        grid: `(height, width)` of the tokens of the images; None if unknown.
        packed: whether rows without a token are left out whatever the execution: so multiply-accumulates are counted.
        differentiable: whether the model was called with gradients: no block of it should be without.
        averaged: whether what the model returns is averaged over the grid by a head that knows of no reduction.
        tower: the model that is called, which may be a replica of the one that was reduced.
        masked: whether the call has a mask. Without one, a mask that blocks are given under an exporter is full.
    """

    reader: str = "grid"
    grid: tuple[int, int] | None = None
    packed: bool = False
    masked: bool = True
    averaged: bool = False
    differentiable: bool = False
    tower: nn.Module | None = None


@dataclass(frozen=True)
class TokenState:
    """What became of the tokens of a call so far.

    Args:
        call: of the model.
        width: N, how many positions there are, the prefix included.
        layout: of the tokens that are carried.
        ids: shaped like the rows: the position of each token, N for a fused token, which has none. None where the host
            has neither rotary positions nor a mask, or before the first reduction.
        sizes: `[B, K]`, how many tokens of the image were merged into each; None if one each.
        bias: `[B, 1, 1, K]`: what every query's attention is to add or, boolean, may read; None if all alike.
        steps: what each block that reduced did, the first first.
        fills: for each step the rows that it reduced; empty where nobody reads the grid.
        tokens: the tokens that are carried, where the tensor that carries this state is the whole grid.
        gathered: arguments of the call at the carried positions: pairs of the argument and what was gathered from it.
    """

    call: Call
    width: int
    layout: Layout
    ids: Int[Tensor, "R n"] | None = None
    sizes: Float[Tensor, "R n"] | None = None
    bias: Tensor | None = None
    steps: tuple[Step, ...] = ()
    fills: tuple[Tensor, ...] = ()
    tokens: Float[Tensor, "R n D"] | None = None
    gathered: list[tuple[Any, Any]] = field(default_factory=list)

    def after(
        self,
        step: Step,
        fill: Float[Tensor, "R n D"],
        *,
        ids: Tensor | None = None,
        sizes: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> "TokenState":
        """The state after one more step, which reduced the rows `fill`."""
        fills = () if self.call.reader == "special" else (*self.fills, fill)
        steps = (*self.steps, step)
        return TokenState(self.call, self.width, step.after, ids, sizes, bias, steps, fills)

    def positions(self, device: torch.device) -> Int[Tensor, "R n"]:
        """The position of each token."""
        if self.ids is not None:
            return self.ids
        assert not self.steps, "positions are known from the first reduction on, or not asked for"
        assert isinstance(self.layout, Padded)
        return torch.arange(self.width, device=device).expand(self.layout.batch, -1)

    def restore(self, rows: Shaped[Tensor, "R n *rest"]) -> Shaped[Tensor, "B N *rest"]:
        """Every position of the image: carried tokens in place, dropped ones as they were when they were dropped."""
        for step, fill in zip(reversed(self.steps), reversed(self.fills), strict=True):
            rows = step.restore(rows, fill)
        return rows

    def on_grid(self, rows: Shaped[Tensor, "R n"], absent: int) -> Shaped[Tensor, "B N"]:
        """A number of each token at all positions that the token holds, `absent` where none is."""
        for step in reversed(self.steps):
            rows = step.restore(rows, rows.new_full(step.before.shape, absent))
        return rows

    def standing(self, device: torch.device) -> Bool[Tensor, "B N"]:
        """At which positions the carried tokens stand; a merged one at the position that its method gives it."""
        if not any(isinstance(step, Merged) for step in self.steps):
            return self.on_grid(torch.ones(self.layout.shape, dtype=torch.bool, device=device), 0)
        batch, width = self.layout.batch, self.width
        positions = torch.arange(width, device=device).expand(batch, -1)
        for step in self.steps:
            positions = F.pad(positions, (0, 1), value=width).gather(1, step.rows)
        return torch.zeros(batch, width + 1, dtype=torch.bool, device=device).scatter(1, positions, True)[:, :-1]

    def kept(self, like: Tensor) -> Bool[Tensor, "B N"]:
        """Which positions are carried, alone or merged."""
        return self.on_grid(torch.ones(like.shape[:2], dtype=torch.bool, device=like.device), 0)


_STATE = "narrows_state"
_CALL = "narrows_call"
_KEPT = "narrows_kept"


def state_of(tokens: Tensor) -> TokenState | None:
    """What a reduced block attached to the tokens it returned; None where no block has reduced them."""
    return getattr(tokens, _STATE, None)


def with_state(tokens: Float[Tensor, "R n D"], state: TokenState) -> Tensor:
    """The tokens with the state attached or, where blocks are read one by one, the whole grid with both attached."""
    setattr(tokens, _STATE, state)
    if state.call.reader != "blocks" or not state.steps:
        return tokens
    grid = state.restore(tokens)
    setattr(grid, _STATE, replace(state, tokens=tokens))
    return grid


def call_of(tokens: Tensor) -> Call | None:
    """What `mark` attached."""
    return getattr(tokens, _CALL, None)


def mark(tokens: Tensor, call: Call) -> None:
    """Attach what is known of the call to tokens that are not reduced yet."""
    setattr(tokens, _CALL, call)


def transposed(tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "n B D"]:
    """The tokens with images and places exchanged, and what is attached to them: of hosts whose batch comes second."""
    other = tokens.transpose(0, 1)
    for name in (_STATE, _CALL, _KEPT):
        if (attached := getattr(tokens, name, None)) is not None:
            setattr(other, name, attached)
    return other


def with_kept_mask(tokens: Float[Tensor, "R n D"], state: TokenState) -> Float[Tensor, "B N D"]:
    """The whole grid after the last block, with the mask of kept positions, for what averages over tokens, attached."""
    grid = state.restore(tokens)
    if state.steps:
        setattr(grid, _KEPT, state.kept(tokens))
    return grid


def kept_mask_of(features: Float[Tensor, "B *features"]) -> Bool[Tensor, "B N"] | None:
    """Which positions were kept through all blocks; None where all were, or where no mask is attached."""
    return getattr(features, _KEPT, None)


def copy_kept_mask(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: the output of a module has the kept mask of its input."""
    kept = kept_mask_of(args[0])
    if kept is not None:
        setattr(output, _KEPT, kept)


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
    fused: bool = True,
) -> Float[Tensor, "R m HD"]:
    """Scaled dot-product attention of the queries of each image over its own keys.

    Args:
        query: rows of `query_layout`.
        key: rows of `key_layout`.
        value: rows of `key_layout`.
        query_layout: padded or packed.
        key_layout: of keys and values; not packed where the queries are padded.
        scale: what logits are multiplied by.
        bias: `[B, 1 or H, 1 or m, n]`, boolean or added to the logits, padding masked; padded rows only.
        dropout: probability at which attention weights are dropped.
        fused: whether a fused kernel may run: they have no second derivative.
    """
    with nullcontext() if fused and not is_transformed(query, key, value) else sdpa_kernel(SDPBackend.MATH):
        if isinstance(query_layout, Packed):
            assert bias is None, "packed rows take no bias"
            if isinstance(key_layout, Packed):
                key_lengths = key_layout.lengths
            else:
                assert key_layout.mask is None, "rows that may be packed are packed at once"
                key_lengths = torch.full_like(query_layout.lengths, key_layout.width)
            rows = query[0], key_layout.to_packed(key), key_layout.to_packed(value)
            lengths, impl = (query_layout.lengths, key_lengths), "auto" if fused else "grouped"
            return ragged_attention(*rows, *lengths, scale=scale, dropout=dropout, impl=impl).flatten(1)[None]
        assert isinstance(key_layout, Padded), "padded queries read padded keys"
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


def pool_kept(features: Float[Tensor, "B N D"], kept: Bool[Tensor, "B N"], kind: str) -> Float[Tensor, "B D"]:
    """Mean ("avg"), maximum ("max") or the mean of both ("avgmax") over the tokens that were kept."""
    kept = kept[..., None]
    if kind == "max":
        return features.masked_fill(~kept, -torch.inf).amax(1)
    mean = features.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    return mean if kind == "avg" else 0.5 * (mean + pool_kept(features, kept[..., 0], "max"))


def with_mean_of_kept(
    features: Float[Tensor, "B N D"], prefix: int, real: Bool[Tensor, "B M"] | None = None
) -> Float[Tensor, "B N D"]:
    """Features whose dropped tokens after the prefix are the mean of kept ones, so that theirs is the mean of all.

    Args:
        features: with the mask of kept tokens attached, or as they are.
        prefix: tokens before the grid.
        real: False at padding of the grid, which is in no mean.
    """
    kept = kept_mask_of(features)
    if kept is None:
        return features
    tokens, kept = features[:, prefix:], kept[:, prefix:]
    mean = pool_kept(tokens, kept if real is None else kept & real, "avg")
    return torch.cat((features[:, :prefix], torch.where(kept[..., None], tokens, mean[:, None])), 1)
