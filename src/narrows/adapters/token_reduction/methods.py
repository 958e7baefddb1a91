"""Methods of token reduction, each a small class (a new one is passed in), and what they may look at in a block."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from narrows.adapters.token_reduction.tokens import Layout
from narrows.ops.token_sampling import TokenSample, inverse_transform_sample, significance
from narrows.ops.token_sampling.common import compact
from narrows.precision import at_least_float32, autocast_off


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
        return significance(attention[..., self.prefix :], norms[..., self.prefix :], self.grid_mask)


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


class ReductionMethod:
    """Says which tokens a block carries on. Subclass `Pruning` or `Merging` and pass an instance as `method=`.

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
    """Base class of methods that choose tokens. Dropped tokens still give a key and a value, and cost no more."""

    @abstractmethod
    def choose(self, signals: Signals, count: int) -> TokenSample:
        """Choose at most `count` of the tokens after the prefix.

        Args:
            signals: of the block.
            count: K, how many may go on; fewer only if the method is `adaptive`, and then at least one.

        Returns:
            `ids [B, K]` counted from the first token after the prefix, ascending, each once, and `mask [B, K]`.
        """


class Merging(ReductionMethod, ABC):
    """Base class of methods that merge tokens, after attention: all attend, fewer go through the feed-forward."""

    # Whether attention counts a merged token as often as the tokens in it (Bolya et al. 2023, section 3).
    proportional: bool = False

    @abstractmethod
    def merge(self, signals: Signals, count: int) -> Merge:
        """Merge the tokens after the prefix to `count` tokens, or one more where the method adds a fused token.

        Args:
            signals: of the block; nothing is masked.
            count: how many tokens go on.

        Returns:
            Where each of the n tokens goes; those of the prefix stay first and unmerged.
        """


class TopK(Pruning):
    """The `count` tokens that receive most attention, mean over heads.

    The choice of EViT (Liang et al. 2022, arXiv 2202.07800) without its fused token; a strong baseline among ten
    methods (Haurum et al. 2023, arXiv 2308.04657).
    """

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The greatest."""
        return greatest(signals.attention[..., signals.prefix :].mean(1), count)


def greatest(scores: Float[Tensor, "B m"], count: int) -> TokenSample:
    """The positions of the `count` greatest scores, ascending."""
    best = scores.topk(count, dim=1).indices
    return compact(scores.new_zeros(scores.shape, dtype=best.dtype).scatter(1, best, 1).bool(), count)


class ATS(Pruning):
    """Adaptive token sampling by the inverse transform of the significance (Fayyaz et al. 2022, arXiv 2111.15667).

    A significant token is hit by many samples and kept once, so that easy images keep fewer tokens. An image that fits
    the budget keeps what it has; with the whole budget, the paper's own setting, every image is sampled in every block.
    """

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The sampled tokens."""
        whole = count >= signals.positions
        return inverse_transform_sample(signals.significance, count, signals.grid_mask, sample_always=whole)


class EViT(Merging):
    """The `count` most attended tokens and one fused of all others (Liang et al. 2022, arXiv 2202.07800, section 3).

    The fused token has no position on the grid. It is the mean of the others weighted by their attention; the paper
    does not normalise the weights, so that its fused token shrinks with the attention that is left.
    """

    def merge(self, signals: Signals, count: int) -> Merge:
        """Kept tokens in their order, the fused one last."""
        prefix = signals.prefix
        attention = signals.attention.mean(1)
        kept = greatest(attention[:, prefix:], count).ids + prefix
        before = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        ids = torch.cat((before, kept, kept.new_full((kept.shape[0], 1), -1)), 1)

        fused = prefix + count
        into = ids.new_full(attention.shape, fused)
        into = into.scatter(1, ids[:, :fused], torch.arange(fused, device=ids.device).expand(ids.shape[0], -1))
        # Without any attention, equal weights.
        weight = attention.clamp_min(torch.finfo(attention.dtype).tiny).where(into == fused, 0.0)
        share = torch.where(into == fused, weight / weight.sum(1, keepdim=True), 1.0)
        return Merge(into, share, ids)


class ToMe(Merging):
    """Bipartite soft matching with proportional attention (Bolya et al. 2023, arXiv 2210.09461, section 3).

    Every other token is matched with the most similar of the rest, by the cosine of their keys, mean over heads. The
    most similar pairs are merged: the mean of all tokens in them, at the position of the second.
    """

    proportional = True
    removes_at_most = 0.5

    def merge(self, signals: Signals, count: int) -> Merge:
        """Tokens that are left in their order; the prefix takes no part."""
        prefix, num_tokens = signals.prefix, signals.keys.shape[1]
        similarity = _similarity(signals.keys[:, prefix:])  # [B, sources, targets]
        best, target = similarity.max(-1)
        removed = greatest(best, num_tokens - prefix - count).ids  # of the sources

        goes = torch.zeros_like(best, dtype=torch.bool).scatter(1, removed, True)
        # Positions after the prefix: sources are 0, 2, 4 ..., targets 1, 3, 5 ...
        stays = torch.ones_like(signals.keys[:, prefix:, 0, 0], dtype=torch.bool)
        stays[:, ::2] = ~goes
        stays = torch.cat((stays.new_ones(stays.shape[0], prefix), stays), 1)
        slot = stays.cumsum(1) - 1
        into = slot.clone()
        into[:, prefix::2] = torch.where(goes, slot[:, prefix + 1 :: 2].gather(1, target), slot[:, prefix::2])

        ids = greatest(stays.float(), prefix + count).ids
        return Merge(into, _shares(into, prefix + count, signals.sizes), ids)


def _similarity(keys: Float[Tensor, "B m H d"]) -> Float[Tensor, "B s t"]:
    keys = F.normalize(keys.mean(2).float(), dim=-1)
    return keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)


def _shares(into: Tensor, num_slots: int, sizes: Tensor | None) -> Float[Tensor, "B n"]:
    """The weight of each token in the mean of those it is merged with, by the number of tokens already in it."""
    sizes = torch.ones(into.shape, device=into.device) if sizes is None else sizes
    total = sizes.new_zeros(into.shape[0], num_slots).scatter_add(1, into, sizes)
    return sizes / total.gather(1, into)


_PRIME = 2**31 - 1


class Random(Pruning):
    """`count` tokens at random: drawn anew for each image while training, the same for every image in evaluation.

    Args:
        seed: decides which tokens evaluation keeps.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The drawn tokens."""
        batch, num_tokens = signals.tokens.shape[:2]
        shape, device = (batch, num_tokens - signals.prefix), signals.tokens.device
        if signals.training:
            return greatest(torch.rand(shape, generator=signals.generator, device=device), count)
        # A hash of the position in place of a generator: it can be traced, and integers are exact on every device.
        place = torch.arange(1, shape[1] + 1, device=device)
        hashed = (place * 48271 + self.seed) % _PRIME
        hashed = (hashed * hashed % _PRIME * 16807 + place) % _PRIME
        return greatest((hashed * hashed % _PRIME).double().expand(shape), count)


METHODS: Mapping[str, type[ReductionMethod]] = MappingProxyType(
    {"ats": ATS, "topk": TopK, "evit": EViT, "tome": ToMe, "random": Random}
)


def attention_of_query(
    query: Float[Tensor, "B 1 H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb n"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The attention weights of one query for each image; `bias` as in `attend`."""
    with autocast_off(key):
        # A sum of products reads the keys once; a batched matrix product would copy them first.
        query = layout.per_row(at_least_float32(query[:, 0]))
        logits = layout.to_padded((at_least_float32(key) * query).sum(-1)).transpose(1, 2) * scale
        return _weights(logits, layout, bias)


def attention_of_logits(
    logits: Float[Tensor, "R r H"], layout: Layout, *, bias: Shaped[Tensor, "Bb Hb q m"] | None = None
) -> Float[Tensor, "B 1 n"]:
    """The attention weights that these logits give, mean over heads; 0 at tokens that no query may attend to."""
    with autocast_off(logits):
        padded = layout.to_padded(at_least_float32(logits)).transpose(1, 2)
        readable = None if bias is None else bias.amax((1, 2))[:, None]
        return _weights(padded, layout, readable).mean(1, keepdim=True)


def mean_attention(
    query: Float[Tensor, "R r H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb q m"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The mean of the attention weights over all queries, one head after another to save memory."""
    mask = layout.mask
    with autocast_off(key):
        queries, keys = at_least_float32(layout.to_padded(query)), at_least_float32(layout.to_padded(key))
        query_weights = None if mask is None else (mask / mask.sum(1, keepdim=True)).to(queries.dtype)[..., None]
        heads = []
        for head in range(queries.shape[2]):
            logits = queries[:, :, head] @ keys[:, :, head].transpose(1, 2) * scale
            of_head = None if bias is None else bias[:, head % bias.shape[1]]
            weights = _weights(logits, layout, of_head)
            heads.append(weights.mean(1) if query_weights is None else (weights * query_weights).sum(1))
    return torch.stack(heads, 1)


def _weights(logits: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """Softmax of logits `[B, m, n]` over the tokens of each image."""
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if layout.mask is None:
        return logits.softmax(-1)
    return logits.masked_fill(~layout.mask[:, None], -torch.inf).softmax(-1)
