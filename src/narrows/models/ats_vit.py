"""A vision transformer that drops the tokens its class token finds insignificant."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.token_sampling import (
    AdaptiveTokenSampler,
    SampledAttention,
    SampledTokens,
    one_hot_routing,
)
from narrows.models.parts import FeedForward, SelfAttention, TokenEmbedding, TransformerClassifier, initialise_linear
from narrows.models.vit import MINI, SMALL
from narrows.ops.token_sampling import gather_tokens, restore
from narrows.routing import Routing
from narrows.validation import check_positive


class ATSBlock(nn.Module):
    """Pre-norm transformer block that carries on the tokens its sampler keeps, or all of them without one.

    Args:
        dim: token width.
        heads: attention heads.
        head_dim: width of a head; `dim / heads` if None.
        mlp_dim: hidden width of the feed-forward.
        sampler: chooses among the tokens after the class token.
        masked: some slots that come in may hold no token, because an earlier block sampled.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: on attention weights and results, and in the feed-forward.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None,
        mlp_dim: int,
        sampler: AdaptiveTokenSampler | None,
        masked: bool,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.masked = masked
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = (
            SelfAttention(dim, heads=heads, head_dim=head_dim, qkv_bias=qkv_bias, dropout=dropout)
            if sampler is None
            else SampledAttention(
                dim, sampler=sampler, heads=heads, head_dim=head_dim, qkv_bias=qkv_bias, dropout=dropout
            )
        )
        self.attention.apply(initialise_linear)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, mlp_dim, dropout=dropout)

    @property
    def samples(self) -> bool:
        """Whether this block drops tokens."""
        return isinstance(self.attention, SampledAttention)

    def forward(self, state: SampledTokens, num_tokens: int | None = None) -> SampledTokens:
        """The tokens carried on, with the positions they had in the image; at most `num_tokens` if given."""
        tokens, ids, mask = state
        normed, readable = self.attention_norm(tokens), mask if self.masked else None
        if isinstance(self.attention, SampledAttention):
            attended, kept, mask = self.attention(normed, readable, num_tokens)
            tokens, ids = gather_tokens(tokens, kept) + attended, ids.gather(1, kept)
        else:
            tokens = tokens + self.attention(normed, readable)
        return SampledTokens(tokens + self.feed_forward(self.feed_forward_norm(tokens)), ids, mask)


class ATSViT(TransformerClassifier):
    """A vision transformer with a class token and adaptive token sampling (Fayyaz et al. 2022, arXiv 2111.15667).

    Args:
        image_size: side of the images the positions are learned on; other sizes interpolate them.
        patch_size: side of a patch.
        num_classes: width of the logits.
        channels: channels of the images.
        stem: "patch", "normed_patch" or "conv", see `TokenEmbedding`.
        dim: token width.
        depth: number of blocks.
        heads: attention heads.
        head_dim: width of a head; `dim / heads` if None.
        mlp_dim: hidden width of the feed-forward.
        keep: for each block how many tokens beside the class token it keeps at most: a count, a share of the image's
            patches at `image_size`, or None to keep all. Fewer than can arrive: images that fit are left whole. Not
            fewer: the block samples every image and drops what is insignificant, as in the paper.
        sampling: "quantile" (deterministic) or "gumbel" (random in evaluation too, from torch's global generator).
        qkv_bias: whether queries, keys and values have a bias.
        dropout: after the embedding, on attention weights and results, and in the feed-forward.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        channels: int = 3,
        stem: str = "patch",
        dim: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        mlp_dim: int,
        keep: Sequence[int | float | None],
        sampling: str = "quantile",
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        check_positive(depth=depth, mlp_dim=mlp_dim)
        if len(keep) != depth:
            raise InvalidArgument("keep", expected=f"one entry for each of the {depth} blocks", got=f"{len(keep)}")
        embedding = TokenEmbedding(
            dim, image_size=image_size, patch_size=patch_size, channels=channels, stem=stem, class_token=True
        )
        room = embedding.side**2
        blocks, masked = [], False
        for entry in keep:
            sampler = None
            if entry is not None:
                count = _count(entry, embedding.side**2)
                sampler = AdaptiveTokenSampler(count, sampling=sampling, sample_always=count >= room)
                room = min(room, count)
            blocks.append(
                ATSBlock(
                    dim,
                    heads=heads,
                    head_dim=head_dim,
                    mlp_dim=mlp_dim,
                    sampler=sampler,
                    masked=masked,
                    qkv_bias=qkv_bias,
                    dropout=dropout,
                )
            )
            masked = masked or sampler is not None
        super().__init__(embedding, blocks, dim=dim, num_classes=num_classes)
        self.embedding_dropout = nn.Dropout(dropout)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The class token after the last block, normalised: `[B, dim]`."""
        return self.norm(self._last(images).tokens[:, 0])

    def forward_tokens(self, images: Float[Tensor, "B C H W"]) -> SampledTokens:
        """All tokens that are left after the last block, normalised, the class token (position 0) first."""
        tokens, ids, mask = self._last(images)
        return SampledTokens(self.norm(tokens) * mask[..., None], ids, mask)

    def feature_map(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """Tokens on the full grid, normalised: those that were dropped in the state they were last in."""
        states = self._states(images)
        everywhere = next(states).tokens
        for state in states:
            everywhere = restore(state, everywhere)
        return self.norm(everywhere[:, 1:]).unflatten(1, self.token_grid(images))

    @torch.no_grad()
    def routing(self, images: Float[Tensor, "B C H W"]) -> tuple[Routing, ...]:
        """For each block that samples, which tokens of the image are left after it."""
        grid, states = self.token_grid(images), self._states(images)
        num_positions = next(states).tokens.shape[1]
        return tuple(
            replace(one_hot_routing(state, num_positions).with_grid(grid, prefix=1), name=f"blocks.{name}")
            for (name, block), state in zip(self.blocks.named_children(), states, strict=True)
            if isinstance(block, ATSBlock) and block.samples
        )

    @torch.no_grad()
    def without_padding(self, images: Float[Tensor, "B C H W"]) -> Iterator[Callable[[], object]]:
        """For each image a call that runs it alone, in slots for exactly the tokens it keeps (`measure` counts it)."""
        for image in images.split(1):
            _, *after_blocks = self._states(image)
            yield partial(self._logits, image, [int(state.mask.sum()) - 1 for state in after_blocks])

    def _logits(self, image: Tensor, room: Sequence[int]) -> Tensor:
        return self.forward_head(self.norm(self._last(image, room).tokens[:, 0]))

    def _last(self, images: Tensor, room: Sequence[int] | None = None) -> SampledTokens:
        states = self._states(images, room)
        last = next(states)
        for last in states:  # noqa: B007 (only the last is kept alive)
            pass
        return last

    def _states(self, images: Tensor, room: Sequence[int] | None = None) -> Iterator[SampledTokens]:
        """The tokens before the first block and after each; `room` for so many instead of the samplers' capacities."""
        tokens = self.embedding_dropout(self.embedding(images))
        ids = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        state = SampledTokens(tokens, ids, torch.ones_like(ids, dtype=torch.bool))
        yield state
        for index, block in enumerate(self.blocks):
            state = block(state, None if room is None else room[index])
            yield state


def _count(entry: int | float, num_patches: int) -> int:
    if isinstance(entry, float):
        if not 0 < entry <= 1:
            raise InvalidArgument("keep", expected="shares above 0 and at most 1", got=entry)
        return max(1, round(entry * num_patches))
    check_positive(keep=entry)
    if entry > num_patches:
        raise InvalidArgument("keep", expected=f"counts of at most the {num_patches} patches", got=entry)
    return entry


PRESETS: dict[str, dict[str, Any]] = {
    "ats_vit_mini": {**MINI, "keep": [None, 32, 16]},
    # A falling capacity, not the paper's K = N in blocks 3 to 11: shapes are static, so only capacity saves time.
    "ats_vit_small": {**SMALL, "keep": [None, None, None, 137, None, None, 96, None, None, 67, None, None]},
}
