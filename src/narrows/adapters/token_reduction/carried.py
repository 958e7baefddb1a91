"""The tokens that blocks still carry, and the full grid that everyone else sees.

A reduced block hands on the full grid `[B, N, D]`, as the block it replaces would: carried tokens in place, dropped
ones in the last state they had. So features, intermediates and hidden states need know nothing of a reduction. What the
next block works on, fewer tokens, travels with that tensor as an attribute. State thereby belongs to the tensors of one
call: nothing is stored in a module, so that exceptions, threads, several calls before a backward pass, and the second
run of gradient checkpointing cannot mix it up.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from narrows.adapters.token_reduction.layout import Layout, Padded, pick, taken
from narrows.ops.token_sampling import TokenSample

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
