"""Vision transformers: the plain one, and those whose blocks pass the tokens through a bottleneck."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NotRequired, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.initial_slots import LearnedSlots
from narrows.layers.initialisation import reset_submodules
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.soft_moe import SoftMoE
from narrows.layers.token_sampling import AdaptiveTokenSampler, SampledAttention, SampledTokens, one_hot_routing
from narrows.models.base import ImageClassifier
from narrows.models.blocks import Block, FeedForward, SelfAttention, TokenEmbedding, initialise_linear
from narrows.ops.token_sampling import gather_tokens, restore
from narrows.routing import Routing
from narrows.validation import check_choice, check_positive, check_share, checked

POOLS = ("avg", "max", "token")


class ViTArguments(TypedDict):
    """Arguments of every vision transformer, besides its depth and those of its bottleneck.

    Args:
        image_size: side of the images the positions are learned on; other sizes interpolate them.
        patch_size: side of a patch.
        num_classes: width of the logits.
        channels: channels of the images, 3 if not given.
        stem: "patch", "normed_patch" or "conv", see `TokenEmbedding`; "patch" if not given.
        dim: token width.
        heads: attention heads, a divisor of `dim`.
        mlp_dim: hidden width of the feed-forward.
        device, dtype: where and in what precision parameters are made.
    """

    image_size: int
    patch_size: int
    num_classes: int
    channels: NotRequired[int]
    stem: NotRequired[str]
    dim: int
    heads: int
    mlp_dim: int
    device: NotRequired[torch.device | str | None]
    dtype: NotRequired[torch.dtype | None]


class TransformerClassifier(ImageClassifier):
    """Embedding, blocks one after another, norm, pooling over the tokens that are left, linear head.

    A subclass lists its blocks and passes `**vit` on; all arguments of its constructor are saved with its weights.

    Args:
        blocks: for each block what makes it, called with `dim`, `heads`, `mlp_dim`, `device` and `dtype`: a module from
            tokens `[B, N, D]` to tokens `[B, N', D]`. A bottleneck is a block that returns fewer.
        global_pool: what the head reads: the mean of all tokens ("avg"), in each channel the greatest ("max"), or the
            class token ("token").

    The other arguments are those of `ViTArguments`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Arguments that a constructor passes on in `**vit` are shown, checked and saved like those it names.
        cls.__init__ = checked(cls.__init__)
        own = inspect.signature(cls.__init__).parameters
        if "vit" in own:
            passed_on = inspect.signature(TransformerClassifier.__init__).parameters
            names = [name for name in passed_on if name in ViTArguments.__annotations__ and name not in own]
            parameters = [*(own[name] for name in own if name != "vit"), *(passed_on[name] for name in names)]
            cls.__init__.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        super().__init_subclass__(**kwargs)

    @checked
    def __init__(
        self,
        blocks: Iterable[Callable[..., nn.Module]],
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        channels: int = 3,
        stem: str = "patch",
        dim: int,
        heads: int,
        mlp_dim: int,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, mlp_dim=mlp_dim)
        check_choice("global_pool", global_pool, POOLS)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.global_pool = global_pool
        self.embedding = TokenEmbedding(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            stem=stem,
            class_token=global_pool == "token",
            **factory,
        )
        self.blocks = nn.Sequential(*(make(dim, heads=heads, mlp_dim=mlp_dim, **factory) for make in blocks))
        self.norm = nn.LayerNorm(dim, **factory)
        self.head = nn.Linear(dim, num_classes, **factory)
        initialise_linear(self.head)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, from the distribution that the constructor draws it from."""
        reset_submodules(self)
        initialise_linear(self.head)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The tokens after the last block, normalised and pooled: `[B, dim]`."""
        return self.pool(self.forward_tokens(images))

    def forward_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The tokens after the last block, normalised: what is left of the image for a reader of tokens."""
        return self.norm(self.blocks(self.embedding(images)))

    def pool(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """One vector for each image from its tokens, as `global_pool` says."""
        if self.global_pool == "token":
            return tokens[:, 0]
        return tokens.amax(1) if self.global_pool == "max" else tokens.mean(1)

    def forward_head(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B classes"]:
        """Logits `[B, num_classes]`."""
        return self.head(features)

    def token_grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """`(height, width)` of the patch grid."""
        return self.embedding.grid(images)

    def no_weight_decay(self) -> set[str]:
        """Names of the positions and the class token, which weight decay should leave alone."""
        return {"embedding.positions", "embedding.class_token"}


def plain_block(dim: int, *, heads: int, mlp_dim: int, dropout: float = 0.0, **factory: Any) -> Block:
    """Self-attention and feed-forward; `dropout` is the feed-forward's."""
    attention = SelfAttention(dim, heads=heads, **factory)
    return Block(dim, attention, FeedForward(dim, mlp_dim, dropout=dropout, **factory), **factory)


class ViT(TransformerClassifier):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), by default mean-pooled (Beyer et al. 2022).

    Args:
        depth: number of blocks.
        dropout: in the feed-forward.
        global_pool: what the head reads: the mean of all tokens ("avg"), in each channel the greatest ("max"), which
            finds what is small in a large image, or a class token ("token").

    The other arguments are those of `ViTArguments`.
    """

    def __init__(
        self, *, depth: int, dropout: float = 0.0, global_pool: str = "avg", **vit: Unpack[ViTArguments]
    ) -> None:
        check_positive(depth=depth)
        check_share(dropout=dropout)
        super().__init__([partial(plain_block, dropout=dropout)] * depth, global_pool=global_pool, **vit)


class SoftMoEViT(TransformerClassifier):
    """The plain vision transformer with `SoftMoE` in the last half of its blocks (Puigcerver et al. 2023, section 3).

    Args:
        depth: number of blocks.
        num_experts: experts of each mixture; `mlp_dim` is the hidden width of each.
        slots_per_expert: slots of each expert; the experts read `num_experts * slots_per_expert` slots, however many
            tokens there are.

    The other arguments are those of `ViTArguments`.
    """

    def __init__(self, *, depth: int, num_experts: int, slots_per_expert: int = 1, **vit: Unpack[ViTArguments]) -> None:
        check_positive(depth=depth)

        def mixture_block(dim: int, *, heads: int, mlp_dim: int, **factory: Any) -> Block:
            attention = SelfAttention(dim, heads=heads, **factory)
            mixture = SoftMoE(
                dim,
                num_experts=num_experts,
                slots_per_expert=slots_per_expert,
                expert_mult=mlp_dim / dim,
                **factory,
            )
            return Block(dim, attention, mixture, **factory)

        super().__init__([plain_block] * (depth // 2) + [mixture_block] * (depth - depth // 2), **vit)


class SlotBottleneck(nn.Module):
    """Tokens `[B, N, dim]` to slots `[B, num_slots, dim]`.

    The slots start from learned vectors, so that a classifier is deterministic; the published Gaussian start is
    `SlotAttention`'s own default.
    """

    def __init__(self, dim: int, *, num_slots: int, num_iterations: int, **factory: Any) -> None:
        super().__init__()
        start = LearnedSlots(num_slots, dim, **factory)
        self.slot_attention = SlotAttention(
            dim, num_slots=num_slots, num_iterations=num_iterations, initial_slots=start, **factory
        )

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K D"]:
        """The slots after the last iteration."""
        return self.slot_attention(tokens).slots


class SlotViT(TransformerClassifier):
    """A vision transformer whose last blocks run on slots (Locatello et al. 2020) instead of tokens.

    Args:
        depth: number of transformer blocks.
        slot_depth: how many of them come after the bottleneck, on slots.
        num_slots: slots that carry the image from there on.
        num_iterations: iterations of slot attention.

    The other arguments are those of `ViTArguments`.
    """

    def __init__(
        self,
        *,
        depth: int,
        slot_depth: int = 1,
        num_slots: int = 8,
        num_iterations: int = 3,
        **vit: Unpack[ViTArguments],
    ) -> None:
        check_positive(depth=depth, num_slots=num_slots)

        def bottleneck(dim: int, *, device: Any, dtype: Any, **_: int) -> SlotBottleneck:
            return SlotBottleneck(dim, num_slots=num_slots, num_iterations=num_iterations, device=device, dtype=dtype)

        blocks: list[Callable[..., nn.Module]] = [plain_block] * depth
        blocks.insert(depth - slot_depth, bottleneck)
        super().__init__(blocks, **vit)


class ResamplerViT(TransformerClassifier):
    """A vision transformer whose last blocks are a Perceiver resampler (Alayrac et al. 2022, section 3.1.1).

    Args:
        depth: number of blocks.
        resampler_depth: how many of them are layers of the resampler.
        num_latents: latents that carry the image from there on.

    The other arguments are those of `ViTArguments`.
    """

    def __init__(
        self, *, depth: int, resampler_depth: int = 1, num_latents: int = 8, **vit: Unpack[ViTArguments]
    ) -> None:
        check_positive(depth=depth, num_latents=num_latents)

        def resampler(dim: int, *, heads: int, mlp_dim: int, **factory: Any) -> PerceiverResampler:
            return PerceiverResampler(
                dim,
                depth=resampler_depth,
                num_latents=num_latents,
                heads=heads,
                head_dim=dim // heads,
                mlp_ratio=mlp_dim / dim,
                num_time_embeddings=1,
                **factory,
            )

        super().__init__([*[plain_block] * (depth - resampler_depth), resampler], **vit)


class ATSBlock(Block):
    """Pre-norm transformer block that keeps only the tokens its attention samples, or all of them.

    Args:
        dim: token width.
        attention: `SampledAttention` chooses among the tokens after the class token, `SelfAttention` keeps all.
        feed_forward: any module on tokens.
        masked: some slots that come in may hold no token, because an earlier block sampled.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        attention: SampledAttention | SelfAttention,
        feed_forward: nn.Module,
        *,
        masked: bool,
        **factory: Any,
    ) -> None:
        super().__init__(dim, attention, feed_forward, **factory)
        self.masked = masked

    @property
    def samples(self) -> bool:
        """Whether this block drops tokens."""
        return isinstance(self.attention, SampledAttention)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: SampledTokens, num_tokens: int | None = None
    ) -> SampledTokens:
        """The tokens that are kept, with the positions they had in the image; at most `num_tokens` if given."""
        tokens, ids, mask = state
        normed, readable = self.attention_norm(tokens), mask if self.masked else None
        if self.samples:
            attended, kept, mask = self.attention(normed, readable, num_tokens)
            tokens, ids = gather_tokens(tokens, kept) + attended, ids.gather(1, kept)
        else:
            tokens = tokens + self.attention(normed, readable)
        return SampledTokens(tokens + self.feed_forward(self.feed_forward_norm(tokens)), ids, mask)


class ATSViT(TransformerClassifier):
    """A vision transformer with a class token and adaptive token sampling (Fayyaz et al. 2022, arXiv 2111.15667).

    Args:
        depth: number of blocks.
        head_dim: width of a head; `dim / heads` if None.
        keep: for each block how many tokens beside the class token it keeps at most: a count, a share of the image's
            patches at `image_size`, or None to keep all. Fewer than can arrive: images that fit are left whole. Not
            fewer: the block samples every image and drops what is insignificant, as in the paper. One entry alone holds
            from block `depth // 4` on, as budgets of `reduce_tokens` do.
        sampling: "quantile" (deterministic) or "gumbel" (random in evaluation too, from torch's global generator).
        qkv_bias: whether queries, keys and values have a bias.
        dropout: after the embedding, on attention weights and results, and in the feed-forward.

    The other arguments are those of `ViTArguments`.
    """

    def __init__(
        self,
        *,
        depth: int,
        head_dim: int | None = None,
        keep: int | float | Sequence[int | float | None],
        sampling: str = "quantile",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        **vit: Unpack[ViTArguments],
    ) -> None:
        check_positive(depth=depth, image_size=vit["image_size"], patch_size=vit["patch_size"])
        check_share(dropout=dropout)
        num_patches = room = (vit["image_size"] // vit["patch_size"]) ** 2
        if not isinstance(keep, Sequence):
            # Later blocks keep what comes; with the whole budget, the paper's own setting, each samples.
            later = keep if _count(keep, num_patches) == num_patches else None
            keep = [*[None] * (depth // 4), keep, *[later] * (depth - depth // 4 - 1)]
        if len(keep) != depth:
            raise InvalidArgument("keep", expected=f"one entry for each of the {depth} blocks", got=f"{len(keep)}")

        def block(
            dim: int, *, heads: int, mlp_dim: int, sampler: AdaptiveTokenSampler | None, masked: bool, **factory: Any
        ) -> ATSBlock:
            options: dict[str, Any] = {
                "heads": heads, "head_dim": head_dim, "qkv_bias": qkv_bias, "dropout": dropout, **factory
            }  # fmt: skip
            attention = (
                SelfAttention(dim, **options) if sampler is None else SampledAttention(dim, sampler=sampler, **options)
            )
            feed_forward = FeedForward(dim, mlp_dim, dropout=dropout, **factory)
            return ATSBlock(dim, attention, feed_forward, masked=masked, **factory)

        blocks: list[Callable[..., nn.Module]] = []
        masked = False
        for entry in keep:
            sampler = None
            if entry is not None:
                count = _count(entry, num_patches)
                sampler = AdaptiveTokenSampler(count, sampling=sampling, sample_always=count >= room)
                room = min(room, count)
            blocks.append(partial(block, sampler=sampler, masked=masked))
            masked = masked or sampler is not None
        super().__init__(blocks, global_pool="token", **vit)
        self.embedding_dropout = nn.Dropout(dropout)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The class token after the last block, normalised: `[B, dim]`."""
        return self.norm(self._last(images).tokens[:, 0])

    def forward_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Float[Tensor, "B C H W"]
    ) -> SampledTokens:
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


MINI: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_classes": 10, "channels": 3, "stem": "conv",
    "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_classes": 1000, "channels": 3, "stem": "patch",
    "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536,
}  # fmt: skip

PRESETS: dict[type[ImageClassifier], dict[str, dict[str, Any]]] = {
    ViT: {"vit_mini": MINI, "vit_small": SMALL},
    SoftMoEViT: {
        "soft_moe_vit_mini": {**MINI, "num_experts": 8, "slots_per_expert": 2},
        "soft_moe_vit_small": {**SMALL, "num_experts": 128},
    },
    SlotViT: {
        "slot_vit_mini": {**MINI, "num_slots": 8},
        "slot_vit_small": {**SMALL, "num_slots": 16, "slot_depth": 4},
    },
    ResamplerViT: {
        "resampler_vit_mini": {**MINI, "num_latents": 8},
        "resampler_vit_small": {**SMALL, "num_latents": 16, "resampler_depth": 4},
    },
    ATSViT: {
        "ats_vit_mini": {**MINI, "keep": [None, 32, 16]},
        # A falling capacity, not the paper's K = N in blocks 3 to 11: shapes are static, so only capacity saves time.
        "ats_vit_small": {**SMALL, "keep": [None, None, None, 137, None, None, 96, None, None, 67, None, None]},
    },
}
