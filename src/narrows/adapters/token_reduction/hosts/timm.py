"""Vision transformers of timm: `VisionTransformer`, `Eva`, `Beit` and `NaFlexVit` with the blocks they are made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.hosts.base import (
    BlockCall,
    HostModel,
    QueryKeyValue,
    added_for,
    first_of,
    unsupported,
)
from narrows.adapters.token_reduction.hosts.parts import Parts, PartsBlock
from narrows.adapters.token_reduction.tokens import Call, kept_mask_of, pool_kept, with_mean_of_kept
from narrows.validation import why_not_plain

_READERS = ("forward", "forward_features", "forward_head")


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is a model of these families."""
    if isinstance(module, Beit):
        embedding: Any = module.patch_embed
        return BeitModel(module, embedding, embedding.img_size)
    if isinstance(module, NaFlexVit):
        embeds: Any = module.embeds
        (rows, columns), (height, width) = embeds.pos_embed_grid_size or (16, 16), embeds.patch_size
        return NaFlexModel(module, embeds, (rows * height, columns * width))
    known = isinstance(module, VisionTransformer | Eva)
    return TimmModel(module, module.patch_embed, module.patch_embed.img_size) if known else None  # pyright: ignore


class TimmModel(HostModel):
    """A `VisionTransformer` (ViT, DeiT, AugReg, DINOv2, CLIP, SigLIP) or `Eva` (EVA-02, DINOv3, PE) of timm.

    Args:
        module: the model.
        embedding: what turns images into tokens.
        image_size: `(height, width)` of the images it was trained on.
    """

    entries = ("forward", "forward_features", "forward_intermediates")
    pooling = "pool"  # the method that pools tokens

    def __init__(self, module: Any, embedding: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__(
            module,
            blocks=module.blocks,
            prefix=module.num_prefix_tokens,
            embedding=embedding,
            image_size=image_size,
        )

    @property
    def class_token(self) -> bool:
        module = self.module
        pooled = module.global_pool not in ("token", "", "prr") or getattr(module, "attn_pool", None) is not None
        embeds = getattr(module, "embeds", module)
        return getattr(embeds, "cls_token", None) is not None and not pooled

    def block(self, index: int) -> "TimmBlock":
        module = self.blocks[index]
        for kind, parts in _BLOCKS.items():
            if type(module).forward is kind.forward:
                return (TimmBeitBlock if kind is BeitBlock else TimmBlock)(module, parts)
        raise unsupported(f"blocks.{index}", module, _names(_BLOCKS))

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        if name == "forward_intermediates":
            return "blocks"
        own = module.global_pool == "token" and not self.stale_heads(module)
        return "special" if name == "forward" and own and getattr(module, "attn_pool", None) is None else "grid"

    def stale_heads(self, model: nn.Module) -> Sequence[str]:
        """Methods that somebody wrote anew: there is no telling what they do with the tokens."""
        kind = type(self.module)
        readers = [name for name in (*_READERS, self.pooling) if not getattr(kind, name).__module__.startswith("timm.")]
        return [f"{kind.__name__}.{name}" for name in dict.fromkeys(readers)]

    def pooling_logits(self, module: Any, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """Under attention pooling, logits of its latent query; under max pooling, the channels."""
        pool: Any = getattr(module, "attn_pool", None)
        if pool is None and module.global_pool == "max":
            return module.norm(tokens)
        if not isinstance(pool, AttentionPoolLatent) or pool.pos_embed is not None or pool.latent_len != 1:
            return None
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)).transpose(1, 2)
        keys = _first_part(pool.kv, module.norm(tokens), pool.num_heads * pool.head_dim)
        keys = pool.k_norm(keys.unflatten(-1, (pool.num_heads, -1)))
        return (keys * query).sum(-1) * pool.scale

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        return ((self.module, self.pooling),)

    @property
    def between(self) -> Sequence[nn.Module]:
        norm = getattr(self.module, "norm", None)
        return () if norm is None else (norm,)

    def pool(
        self, module: Any, own: Callable[..., Tensor], x: Float[Tensor, "B N D"], pool_type: str | None = None
    ) -> Tensor:
        """The model's own `pool`, of kept tokens only."""
        kept, kind = kept_mask_of(x), module.global_pool if pool_type is None else pool_type
        attends: bool = isinstance(module.attn_pool, AttentionPoolLatent)
        if kept is None or (not attends and kind not in ("avg", "max", "avgmax")):
            return own(x, pool_type)
        # The two families differ in whether special tokens are pooled too.
        prefix = 0 if getattr(module, "pool_include_prefix", attends and isinstance(module, Eva)) else self.prefix
        x, kept = x[:, prefix:], kept[:, prefix:]
        if not attends:
            return pool_kept(x, kept, kind)
        attn_pool: Any = module.attn_pool
        return attn_pool(x, attn_mask=x.new_zeros(kept.shape).masked_fill(~kept, -torch.inf)[:, None, None])

    @property
    def drops_patches(self) -> bool:
        patch_drop = getattr(self.module, "patch_drop", None)
        return self.module.training and patch_drop is not None and not isinstance(patch_drop, nn.Identity)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        embedding: Any = self.embedding
        return embedding.dynamic_feat_size((height, width))

    def example(self, batch: int) -> dict[str, Tensor]:
        # Before timm 1.0.25 of these only an embedding without a convolution, of NaFlex, knows its channels.
        first: Any = next((part for part in self.embedding.modules() if isinstance(part, nn.Conv2d)), None)
        channels = getattr(self.embedding, "in_chans", 3) if first is None else first.in_channels
        return {"x": self.random_images(batch, channels)}


class BeitModel(TimmModel):
    """A `Beit` of timm, whose head averages by itself."""

    pooling = "forward_head"

    def pool(
        self, module: Any, own: Callable[..., Tensor], x: Float[Tensor, "B N D"], *args: Any, **kwargs: Any
    ) -> Any:
        return own(with_mean_of_kept(x, self.prefix), *args, **kwargs)


class NaFlexModel(TimmModel):
    """A `NaFlexVit` of timm: images, or patches cut already with padding."""

    pooling = "_pool"

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """None of patches that are cut already: each image has its own grid, and padding."""
        return super().grid_of(images) if images.ndim == 4 else None

    def pool(
        self,
        module: Any,
        own: Callable[..., Tensor],
        x: Float[Tensor, "B N D"],
        pool_type: str | None = None,
        patch_valid: Tensor | None = None,
    ) -> Tensor:
        """Kept tokens are what is valid to the model's own pooling."""
        kept = kept_mask_of(x)
        if kept is not None:
            kept = kept[:, self.prefix :]
            patch_valid = kept if patch_valid is None else kept & patch_valid.bool()
        return own(x, pool_type, patch_valid)

    def check_count(self, width: int, call: Call) -> None:
        """Patches that are cut already come in any number."""
        if call.grid is not None:
            super().check_count(width, call)


class TimmBlock(PartsBlock):
    """A block of timm: attention of one of four classes, and a feed-forward."""

    def __init__(self, module: Any, parts: Parts) -> None:
        super().__init__(module, parts)
        if not any(type(self.attention).forward is kind.forward for kind in _ATTENTIONS):
            raise unsupported(f"{type(module).__name__}.attn", self.attention, _names(_ATTENTIONS))
        # Of its forward, after the tokens: not all blocks take the same.
        self._arguments = tuple(signature(type(module).forward).parameters)[2:]

    @property
    def fused(self) -> bool:
        return self.attention.fused_attn

    @property
    def gated(self) -> bool:
        return getattr(self.attention, "gate", None) is not None

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._arguments, args, strict=False)), **kwargs}

    def arguments(self, x: Float[Tensor, "B N D"], *args: Any, **kwargs: Any) -> BlockCall:
        given = self._named(args, kwargs)
        causal = "causal" if given.get("is_causal") else None
        return BlockCall(given.get("rope"), causal or given.get("attn_mask"))

    def mask_of(self, bias: Any, width: int) -> Tensor:
        if isinstance(bias, str):
            bias = torch.ones(width, width, dtype=torch.bool, device=self.module.norm1.weight.device).tril()
        return bias.reshape((1,) * (4 - bias.ndim) + bias.shape).expand(-1, -1, width, width)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._named(args[1:], kwargs)
        given.update({name: value for name, value in (("attn_mask", bias), ("is_causal", False)) if name in given})
        if bias is not None:
            given["attn_mask"] = bias
        if rotary is not None:
            given["rope"] = rotary[:, self.attention.num_prefix_tokens :].transpose(1, 2)
        return args[:1], given

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        query, key, value = _projected(self.attention, normed)
        query, key = self._through(("attn.q_norm",), query), self._through(("attn.k_norm",), key)
        # Grouped-query attention: each key or value repeated for the query heads of its group.
        groups = getattr(self.attention, "num_kv_groups", 1)
        return QueryKeyValue(
            query, *(each if groups == 1 else each.repeat_interleave(groups, 2) for each in (key, value))
        )

    def rotary_rows(self, rotary: Tensor, width: int, prefix: int) -> Float[Tensor, "B N H R"]:
        """Sines and cosines of all positions; for the prefix and for fused tokens, the identity: sine 0, cosine 1."""
        rows = rotary[:, None] if rotary.ndim == 2 else rotary.movedim(-3, -2)  # [N, R]; [H, N, R] or [B, H, N, R]
        rows = rows[None] if rows.ndim == 3 else rows
        identity = torch.zeros_like(rows[:, :1])
        identity[..., rows.shape[-1] // 2 :] = 1
        return torch.cat((identity.expand(-1, self.attention.num_prefix_tokens, -1, -1), rows, identity), 1)

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Rotated as the attention module does."""
        rotated = apply_rot_embed_cat(heads, rotary, half=getattr(self.attention, "rotate_half", False))
        return rotated.to(heads.dtype)

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"] | None
    ) -> Float[Tensor, "R m D"]:
        """Norm and gate of the attention module come before its projection."""
        attended = self._through(("attn.norm",), attended)
        if self.gated:
            attended = attended * self.attention.gate(normed).sigmoid()
        return super().attention_update(attended, normed)

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        return self.module.drop_path1, self.module.drop_path2


class TimmBeitBlock(TimmBlock):
    """`Block` of BEiT: relative positions of its own, or of all blocks, are added to the logits."""

    @property
    def takes_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its own are those of the whole grid."""
        return self.attention.relative_position_bias_table is None

    def arguments(self, x: Float[Tensor, "B N D"], *args: Any, **kwargs: Any) -> BlockCall:
        shared = self._named(args, kwargs).get("shared_rel_pos_bias")
        if self.takes_positions:
            return BlockCall(relative=shared)
        own = self.attention._get_rel_pos_bias()
        return BlockCall(relative=own if shared is None else own + shared)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if bias is not None and bias.dtype == torch.bool:
            bias = added_for(bias, first_of(args, kwargs).dtype)
        return args[:1], {"shared_rel_pos_bias": bias}


def _projected(attention: Any, normed: Float[Tensor, "R n D"]) -> Sequence[Float[Tensor, "R n G d"]]:
    """Queries, keys and values, by `qkv`, whose biases may stand beside it, or by separate layers."""
    if attention.qkv is None:
        rows = [layer(normed) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        width = rows[0].shape[-1] // attention.num_heads  # of keys and values too, of which there may be fewer heads
        return [row.unflatten(-1, (-1, width)) for row in rows]
    rows = attention.qkv(normed)
    if getattr(attention, "q_bias", None) is not None:
        rows = rows + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    return rows.unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)


def _first_part(module: nn.Module, rows: Float[Tensor, "*batch D"], width: int) -> Float[Tensor, "*batch width"]:
    """`module(rows)[..., :width]`; of a plain `nn.Linear` nothing else is computed."""
    if not isinstance(module, nn.Linear) or why_not_plain((("", module),), kinds=(nn.Linear,)) is not None:
        return module(rows)[..., :width]
    return F.linear(rows, module.weight[:width], None if module.bias is None else module.bias[:width])


def _names(known: Iterable[type[nn.Module]]) -> str:
    return f"one of {', '.join(kind.__name__ for kind in known)}"


_ATTENTIONS = (Attention, AttentionRope, EvaAttention, BeitAttention)
_PRE_NORM = Parts(
    "norm1",
    "attn",
    ("qkv",),
    ("attn.proj", "attn.proj_drop", "ls1", "gamma_1"),
    ("norm2", "mlp", "ls2", "gamma_2"),
    scale="scale",
)
_POST_NORM = _PRE_NORM._replace(norm="", update=("attn.proj", "attn.proj_drop", "norm1"), feed_forward=("mlp", "norm2"))
_BLOCKS: Mapping[type[nn.Module], Parts] = MappingProxyType(
    {
        Block: _PRE_NORM,
        ResPostBlock: _POST_NORM,
        EvaBlock: _PRE_NORM,
        EvaBlockPostNorm: _POST_NORM,
        BeitBlock: _PRE_NORM,
    }
)
