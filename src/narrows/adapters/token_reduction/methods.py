"""Methods of token reduction, each a small class (a new one is passed in), and what they may look at in a block."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from narrows.adapters.token_reduction import plugins
from narrows.adapters.token_reduction.tokens import Layout, Packed, gather_rows
from narrows.ops.token_sampling import TokenSample, inverse_transform_sample, significance, with_prefix
from narrows.precision import accumulation_dtype, at_least_float32, autocast_off


@dataclass(frozen=True)
class Signals:
    """What a method may look at in one block, padded to n tokens for each image; computed on access.

    Methods run without gradients: which tokens are chosen has none, the tokens that were chosen have.

    Args:
        rows: tokens, keys and values `[R, n, ...]` in the block's layout. Keys have no rotary positions: they compare
            contents.
        layout: padded or packed.
        attention_received: computes `attention`.
        prefix: P, how many tokens stand before the grid; they are always kept.
        positions: how many tokens the image had after the prefix before any were dropped.
        row_sizes: how many tokens of the image were merged into each row; None if one each.
        training: whether the model trains; only then may a choice be random.
        generator: source of randomness; None takes torch's global one.
    """

    rows: tuple[Tensor, Tensor, Tensor]
    layout: Layout
    attention_received: Callable[[], Float[Tensor, "B G n"]]
    prefix: int
    positions: int
    row_sizes: Float[Tensor, "R n"] | None = None
    training: bool = False
    generator: torch.Generator | None = None

    @property
    def tokens(self) -> Float[Tensor, "B n D"]:
        """The input of the block."""
        return self.layout.to_padded(self.rows[0])

    @property
    def keys(self) -> Float[Tensor, "B n H d"]:
        """Keys of attention, without rotary positions."""
        return self.layout.to_padded(self.rows[1])

    @property
    def values(self) -> Float[Tensor, "B n H d"]:
        """Values of attention."""
        return self.layout.to_padded(self.rows[2])

    @property
    def sizes(self) -> Float[Tensor, "B n"] | None:
        """How many tokens of the image were merged into each token; None if one each."""
        return None if self.row_sizes is None else self.layout.to_padded(self.row_sizes)

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
        """The attention that each token receives, float32 or better; 0 at padding.

        For each head: from the class token, or, where the classifier reads no class token, the mean over all queries.
        Under attention pooling or max pooling: from the pooling query (`HostModel.pooling_logits`), the mean over heads
        or channels.
        """
        return self.attention_received()

    @property
    def significance(self) -> Float[Tensor, "B m"]:
        """Attention received times the norm of the value, summed over heads, normalised over the grid."""
        with autocast_off(self.rows[2]):
            norms = torch.linalg.vector_norm(at_least_float32(self.rows[2]), dim=-1)
        norms = self.layout.to_padded(norms).transpose(1, 2)
        attention = self.attention.expand_as(norms)
        # No mask: attention is 0 at padding.
        return significance(attention[..., self.prefix :], norms[..., self.prefix :])


class Merge(NamedTuple):
    """Which tokens are merged into which.

    Args:
        into: `[B, n]`, the new token (of the K) that each token is merged into; -1 for one that is dropped.
        share: `[B, n]`, the weight of each token in the weighted sum that becomes the new token.
        ids: `[B, K]`, the token (of the n) whose position each new token keeps; -1 for one without a position.
    """

    into: Int[Tensor, "B n"]
    share: Float[Tensor, "B n"]
    ids: Int[Tensor, "B K"]


class MergedTokens(NamedTuple):
    """Tokens after a merge.

    Args:
        tokens: `[B, K, D]`; one that nothing was merged into is the same bit for bit.
        ids: `[B, K']`, the token (of the n) whose position each of the first K' new tokens keeps, n for one without;
            those after them have none.
        into: n to `[B, n]`, the new token that each token went into; some number for one that was dropped. It is called
            when somebody asks. None if no token but those of `ids` is in a new one with a position.
        placed: `[B, n]`, False where a token was dropped or went into one without a position; None if nowhere.
        sizes: `[B, K]`, how many tokens of the image each new token holds; None for methods not `proportional`.
    """

    tokens: Float[Tensor, "B K D"]
    ids: Int[Tensor, "B J"]
    into: Callable[[int], Int[Tensor, "B n"]] | None = None
    placed: Bool[Tensor, "B n"] | None = None
    sizes: Float[Tensor, "B K"] | None = None


class ReductionMethod:
    """Says which tokens a block carries on. Subclass `Scoring`, `Pruning` or `Merging`, pass an instance as `method=`.

    Methods see the prefix tokens (class token, distillation token, registers) only in `Signals`, and cannot drop them.
    They hold settings and no state: what they need comes in with the signals.
    """

    # Whether an image may keep fewer tokens than the budget allows.
    adaptive: bool = False
    # The greatest share of tokens that one application can remove; below 1, a budget is spread over several blocks.
    removes_at_most: float = 1.0

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__


class Pruning(ReductionMethod, ABC):
    """Base class of methods that choose tokens. Dropped tokens are still read by the attention of that block."""

    @abstractmethod
    def choose(self, signals: Signals, count: int) -> TokenSample:
        """Choose at most `count` of the tokens after the prefix.

        Args:
            signals: of the block.
            count: K, how many may go on; fewer only if the method is `adaptive`, and then at least one.

        Returns:
            `ids [B, K]` counted from the first token after the prefix, ascending, each once, and `mask [B, K]`.
        """

    def choose_with_prefix(self, signals: Signals, count: int) -> tuple[Tensor, Tensor | None]:
        """The same with the tokens of the prefix before them, `[B, P + K]`; None for the mask if it is not `adaptive`.

        To be overridden where it takes fewer operations.
        """
        return with_prefix(self.choose(signals, count), signals.prefix)


class Scoring(Pruning):
    """Base class of methods that keep the `count` tokens of the greatest scores, of equal ones any."""

    @abstractmethod
    def scores(self, signals: Signals) -> Float[Tensor, "B n"]:
        """A score for every token; those of the prefix are not looked at."""

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The greatest, in their order."""
        ids = greatest(self.scores(signals)[:, signals.prefix :], count)
        return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool))

    def choose_with_prefix(self, signals: Signals, count: int) -> tuple[Tensor, Tensor | None]:
        """The greatest, the prefix as if it had the greatest of all."""
        if type(self).choose is not Scoring.choose:
            return super().choose_with_prefix(signals, count)
        return greatest_with_prefix(self.scores(signals), count, signals.prefix), None


def greatest(scores: Float[Tensor, "B m"], count: int) -> Int[Tensor, "B K"]:
    """The positions of the `count` greatest scores, ascending."""
    return scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


class Merging(ReductionMethod):
    """Base class of methods that merge tokens, after attention: all attend, fewer go through the feed-forward.

    A subclass says by `merge` which tokens become one; or it merges them itself, in `merged`.
    """

    # Whether attention counts a merged token as often as the tokens in it (Bolya et al. 2023, section 3).
    proportional: bool = False

    def merge(self, signals: Signals, count: int) -> Merge:
        """Merge the tokens after the prefix to `count` tokens, or one more where the method adds a fused token.

        Args:
            signals: of the block; nothing is masked.
            count: how many tokens go on.

        Returns:
            Where each of the n tokens goes; those of the prefix stay first and unmerged.
        """
        raise NotImplementedError(f"{self.name} has neither merge nor merged")

    def merged(self, signals: Signals, tokens: Float[Tensor, "B n D"], count: int) -> MergedTokens:
        """Merge these tokens, the block's after attention, as `merge` says.

        The gradient passes through the tokens and not through the choice.
        """
        with torch.no_grad():
            merge = self.merge(signals, count)
            owned, width = merge.ids >= 0, merge.into.shape[1]
            slots = torch.arange(merge.ids.shape[1], device=merge.into.device)[:, None]
            belongs = merge.into[:, None] == slots  # [B, K, n]
            own = merge.ids.clamp_min(0)
            share = (belongs * merge.share[:, None]).to(tokens.dtype)
            # A new token's own share is applied to the token itself: multiplied by 1, it keeps its bits.
            is_own = (torch.arange(width, device=own.device) == own[..., None]) & owned[..., None]
            own_share = (share * is_own).sum(-1, keepdim=True)
            placed = (merge.into >= 0) & owned.gather(1, merge.into.clamp_min(0))
            sizes = None
            if self.proportional:
                before = torch.ones_like(merge.share) if signals.sizes is None else signals.sizes
                sizes = (belongs * before[:, None]).sum(-1)
        with autocast_off(tokens):
            # A product, not index_add, which sums in no fixed order on a GPU and which few runtimes can export.
            others = share.masked_fill(is_own, 0).bmm(tokens)
            new = gather_rows(tokens, own) * own_share + others
        into = partial(_given, merge.into.clamp_min(0))
        return MergedTokens(new, merge.ids.where(owned, width), into, placed, sizes)


def _given(into: Tensor, _: int) -> Tensor:
    return into


class TopK(Scoring):
    """The `count` tokens that receive most attention, mean over heads.

    The choice of EViT (Liang et al. 2022, arXiv 2202.07800) without its fused token; a strong baseline among ten
    methods (Haurum et al. 2023, arXiv 2308.04657).
    """

    def scores(self, signals: Signals) -> Float[Tensor, "B n"]:
        """The attention received."""
        return signals.attention.mean(1)


class ATS(Pruning):
    """Adaptive token sampling by the inverse transform of the significance (Fayyaz et al. 2022, arXiv 2111.15667).

    A significant token is hit by many samples and kept once, so that easy images keep fewer tokens. An image that fits
    the budget keeps what it has; with the whole budget, the paper's own setting, every image is sampled in every block.
    """

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The sampled tokens."""
        return self._sampled(signals, count, 0)

    def choose_with_prefix(self, signals: Signals, count: int) -> tuple[Tensor, Tensor | None]:
        """The prefix and the sampled tokens."""
        return self._sampled(signals, count, signals.prefix)

    def _sampled(self, signals: Signals, count: int, prefix: int) -> TokenSample:
        scores, whole = signals.significance, count >= signals.positions
        return inverse_transform_sample(scores, count, signals.grid_mask, sample_always=whole, prefix=prefix)


class EViT(Merging):
    """The `count` most attended tokens and one fused of all others (Liang et al. 2022, arXiv 2202.07800, section 3).

    The fused token has no position on the grid. It is the mean of the others weighted by their attention; the paper
    does not normalise the weights, so that its fused token shrinks with the attention that is left.
    """

    def merged(self, signals: Signals, tokens: Float[Tensor, "B n D"], count: int) -> MergedTokens:
        """Kept tokens in their order, the fused one last."""
        prefix = signals.prefix
        with torch.no_grad():
            attention = signals.attention.mean(1)
            attention[:, :prefix] = torch.inf
            kept = greatest(attention, prefix + count)
            # Without any attention, equal weights.
            weight = attention.clamp_min(torch.finfo(attention.dtype).tiny).scatter(1, kept, 0.0)
            share = (weight / weight.sum(1, keepdim=True)).to(tokens.dtype)
        with autocast_off(tokens):
            fused = share[:, None].bmm(tokens)
        return MergedTokens(torch.cat((gather_rows(tokens, kept), fused), 1), kept)


def greatest_with_prefix(scores: Float[Tensor, "B n"], count: int, prefix: int) -> Int[Tensor, "B K"]:
    """The positions of the prefix and of the `count` greatest scores after it, ascending."""
    if prefix:
        scores = torch.cat((scores.new_full((scores.shape[0], prefix), torch.inf), scores[:, prefix:]), 1)
    return greatest(scores, prefix + count)


# Greater than any position; a size would be a symbol under an exporter, and ONNX scatters numbers only.
_NOWHERE = 2**40


class ToMe(Merging):
    """Bipartite soft matching with proportional attention (Bolya et al. 2023, arXiv 2210.09461, section 3).

    Every other token is matched with the most similar of the rest, by the cosine of their keys, mean over heads. The
    most similar pairs are merged: the mean of all tokens in them, at the position of the second.
    """

    proportional = True
    removes_at_most = 0.5

    def merged(self, signals: Signals, tokens: Float[Tensor, "B n D"], count: int) -> MergedTokens:
        """Tokens that are left in their order; the prefix takes no part."""
        prefix, width = signals.prefix, tokens.shape[1]
        # Positions after the prefix: sources are 0, 2, 4 ..., targets 1, 3, 5 ...
        sources, targets = slice(prefix, None, 2), slice(prefix + 1, None, 2)
        with torch.no_grad():
            best, target = _similarity(signals.keys[:, prefix:]).max(-1)
            order = best.sort(dim=1, descending=True).indices
            removed, staying = order.split((width - prefix - count, order.shape[1] - (width - prefix - count)), 1)
            place = torch.arange(width, device=target.device).expand(target.shape[0], -1)
            left = place[:, sources].scatter(1, removed, _NOWHERE)
            ids = torch.cat((place[:, :prefix], place[:, targets], left), 1).sort(dim=1).values[:, : prefix + count]

            # The target of each source that goes; of one that stays a number that is none's.
            goes_to = target.scatter(1, staying, _NOWHERE)
            # The number of each target among targets; a half or a negative number at all other positions.
            start = -(prefix + 1) / 2
            number = torch.arange(start, start + width / 2 - 0.25, 0.5, device=target.device, dtype=torch.float32)
            belongs = goes_to[:, None] == number[:, None]  # [B, n, sources]
            if signals.sizes is None:
                weight, total = belongs, belongs.sum(-1, dtype=tokens.dtype) + 1
            else:
                weight = belongs * signals.sizes[:, None, sources]
                total = weight.sum(-1) + signals.sizes
            share = weight / total[..., None]
        with autocast_off(tokens):
            # Added to what was there, so that a token that nothing is merged into keeps its bits. A product, not
            # index_add, which sums in no fixed order on a GPU and which few runtimes can export.
            away = tokens[:, sources] - gather_rows(tokens[:, targets], target)
            merged = gather_rows(torch.baddbmm(tokens, share, away), ids)
        into = partial(_merged_into, ids, goes_to, prefix)
        return MergedTokens(merged, ids, into, None, gather_rows(total, ids))


def _similarity(keys: Float[Tensor, "B m H d"]) -> Float[Tensor, "B s t"]:
    """The cosine of each source and each target, times d."""
    with autocast_off(keys):
        keys = keys.mean(2, dtype=accumulation_dtype(keys))
        keys = F.rms_norm(keys, keys.shape[-1:], eps=1e-30)
        # Not `@`, which exporters take apart by strides: an even number of tokens would be written down.
        return keys[:, ::2].bmm(keys[:, 1::2].transpose(1, 2))


def _merged_into(ids: Int[Tensor, "B K"], goes_to: Int[Tensor, "B s"], prefix: int, width: int) -> Int[Tensor, "B n"]:
    """The new token that each of the n = `width` tokens went into, by those that stayed and the targets of sources."""
    slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    into = torch.zeros((ids.shape[0], width), dtype=torch.long, device=ids.device).scatter(1, ids, slots)
    own, of_targets = into[:, prefix::2], into[:, prefix + 1 :: 2]
    goes = goes_to < goes_to.shape[1]
    into[:, prefix::2] = torch.where(goes, of_targets.gather(1, goes_to.clamp_max(of_targets.shape[1] - 1)), own)
    return into


_PRIME = 2**31 - 1


class Random(Scoring):
    """`count` tokens at random: drawn anew for each image while training, the same for every image in evaluation.

    Args:
        seed: decides which tokens evaluation keeps.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, signals: Signals) -> Float[Tensor, "B n"]:
        """Random numbers, or a hash of the place."""
        batch, num_tokens = signals.tokens.shape[:2]
        shape, device = (batch, num_tokens - signals.prefix), signals.tokens.device
        if signals.training:
            # Not `torch.rand`, which compilers do not trace for any number of images where it takes a generator.
            drawn = torch.empty(shape, device=device).uniform_(generator=signals.generator)
        else:
            # A hash in place of a generator: it can be traced, and integers are exact on every device.
            place = torch.arange(1, shape[1] + 1, device=device)
            hashed = (place * 48271 + self.seed) % _PRIME
            hashed = (hashed * hashed % _PRIME * 16807 + place) % _PRIME
            drawn = (hashed * hashed % _PRIME).double().expand(shape)
        return F.pad(drawn, (signals.prefix, 0))


METHODS: Mapping[str, Callable[[], ReductionMethod]] = plugins.WithPlugins(
    {"ats": ATS, "topk": TopK, "evit": EViT, "tome": ToMe, "random": Random}, plugins.METHODS
)
"""Ours, and those that other packages bring as entry points in "narrows.methods"."""


def attention_of_query(
    query: Float[Tensor, "B H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb n"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The attention weights of one query for each image; `bias` as in `attend`."""
    with autocast_off(key):
        # A sum of products reads the keys once; a batched matrix product would copy them first.
        query = layout.per_row(at_least_float32(query) * scale)
        logits = layout.to_padded((key * query).sum(-1)).transpose(1, 2)
        return _weights(logits, layout, bias)


def attention_of_logits(
    logits: Float[Tensor, "R r H"], layout: Layout, *, bias: Shaped[Tensor, "Bb Hb q m"] | None = None
) -> Float[Tensor, "B 1 n"]:
    """The attention weights that these logits give, mean over heads; 0 at tokens that no query may attend to."""
    with autocast_off(logits):
        padded = layout.to_padded(at_least_float32(logits)).transpose(1, 2)
        return _weights(padded, layout, None if bias is None else bias.amax((1, 2))[:, None]).mean(1, keepdim=True)


def mean_attention(
    query: Float[Tensor, "R r H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb q m"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The mean of the attention weights over all queries that are tokens, one head after another to save memory.

    A token that no query may attend to is padding, and has no say.
    """
    with autocast_off(key):
        queries, keys = at_least_float32(layout.to_padded(query)), at_least_float32(layout.to_padded(key))
        says = layout.mask
        if bias is not None:
            read = bias.amax((1, 2)) if bias.dtype == torch.bool else bias.amax((1, 2)) > torch.finfo(bias.dtype).min
            says = read if says is None else read & says
        shares = None if says is None else (says / says.sum(1, keepdim=True).clamp_min(1)).to(queries.dtype)[..., None]
        heads = []
        for head in range(queries.shape[2]):
            logits = queries[:, :, head].bmm(keys[:, :, head].transpose(1, 2)) * scale
            of_head = None if bias is None else bias[:, head % bias.shape[1]]
            weights = _weights(logits, layout, of_head)
            heads.append(weights.mean(1) if shares is None else (weights * shares).sum(1))
    return torch.stack(heads, 1)


def _weights(logits: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """Softmax of logits `[B, m, n]` over the tokens of each image; of padded rows, `bias` masks the padding."""
    if bias is not None:
        logits = torch.where(bias, logits, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if isinstance(layout, Packed):
        logits = logits.masked_fill(~layout.mask[:, None], -torch.inf)
    return logits.softmax(-1)
