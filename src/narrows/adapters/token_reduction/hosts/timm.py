"""Vision transformers of timm: `VisionTransformer` and `Eva` with the blocks they are built from."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from narrows.adapters.token_reduction.hosts.base import (
    BlockCall,
    HostBlock,
    HostModel,
    QueryKeyValue,
    linear_part,
    unsupported,
)
from narrows.adapters.token_reduction.tokens import kept_mask_of, pool_kept


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is a model of these families."""
    return TimmModel(module) if isinstance(module, VisionTransformer | Eva) else None


class TimmModel(HostModel):
    """A `VisionTransformer` (ViT, DeiT, AugReg, DINOv2, CLIP, SigLIP) or `Eva` (EVA-02, DINOv3, PE) of timm."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(
            module,
            blocks=module.blocks,
            prefix=module.num_prefix_tokens,
            embedding=module.patch_embed,
            image_size=module.patch_embed.img_size,
            class_token=module.cls_token is not None and module.global_pool in ("token", "", "prr"),
        )

    def block(self, index: int) -> HostBlock:
        module = self.blocks[index]
        for kind, host in _BLOCKS.items():
            if type(module).forward is kind.forward:
                return host(module)
        raise unsupported(f"blocks.{index}", module, _names(_BLOCKS))

    def pooling_logits(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """Under attention pooling, logits of its latent query; under max pooling, the channels."""
        pool: Any = self.module.attn_pool
        if pool is None and self.module.global_pool == "max":
            return self.module.norm(tokens)
        if not isinstance(pool, AttentionPoolLatent) or pool.pos_embed is not None or pool.latent_len != 1:
            return None
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)).transpose(1, 2)
        keys = linear_part(pool.kv, self.module.norm(tokens), 0, pool.num_heads * pool.head_dim)
        keys = pool.k_norm(keys.unflatten(-1, (pool.num_heads, -1)))
        return (keys * query).sum(-1) * pool.scale

    @property
    def readout(self) -> Sequence[tuple[nn.Module, str, Callable[..., Any]]]:
        """`pool`, unless the class token is read."""
        return () if self.class_token else ((self.module, "pool", self.pool),)

    @property
    def between(self) -> Sequence[nn.Module]:
        return (self.module.norm,)

    def pool(self, x: Float[Tensor, "B N D"], pool_type: str | None = None) -> Tensor:
        """The model's own `pool`, of kept tokens only."""
        module = self.module
        kept, kind = kept_mask_of(x), module.global_pool if pool_type is None else pool_type
        attends: bool = isinstance(module.attn_pool, AttentionPoolLatent)
        if kept is None or (not attends and kind not in ("avg", "max", "avgmax")):
            return type(module).pool(module, x, pool_type)
        # The two families differ in whether special tokens are pooled too.
        prefix = 0 if getattr(module, "pool_include_prefix", attends and isinstance(module, Eva)) else self.prefix
        x, kept = x[:, prefix:], kept[:, prefix:]
        if not attends:
            return pool_kept(x, kept, kind)
        bias = x.new_zeros(kept.shape).masked_fill(~kept, -torch.inf)
        pool: Any = module.attn_pool
        return pool(x, attn_mask=bias[:, None, None])

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self.module.patch_embed.dynamic_feat_size((height, width))

    def example(self, batch: int) -> dict[str, Tensor]:
        weight = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, self.module.in_chans, *self.image_size, generator=generator)
        return {"x": images.to(weight.device, weight.dtype)}


class _TimmBlock(HostBlock):
    """Base class of all blocks: attention of one of three classes, and a feed-forward."""

    module: Any
    parameters: tuple[str, ...] = ("attn_mask", "is_causal")  # of the block's forward, after the tokens

    def __init__(self, module: Any) -> None:
        super().__init__(module, scale=module.attn.scale)
        for kind, projections in _ATTENTIONS.items():
            if type(module.attn).forward is kind.forward:
                self.projections = projections
                return
        raise unsupported(f"{type(module).__name__}.attn", module.attn, _names(_ATTENTIONS))

    @property
    def dropout(self) -> float:
        return self.module.attn.attn_drop.p if self.module.attn.training else 0.0

    def arguments(self, x: Float[Tensor, "B N D"], *args: Any, **kwargs: Any) -> BlockCall:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        rope, bias = given.get("rope"), given.get("attn_mask")
        if given.get("is_causal"):
            bias = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if bias is not None:
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape).expand(-1, -1, x.shape[1], x.shape[1])
        return BlockCall(x, None if rope is None else _rotary(rope, self.module.attn.num_prefix_tokens), bias)

    def query(self, normed: Float[Tensor, "R m D"]) -> Float[Tensor, "R m H d"]:
        (query,) = self.projections(self.module.attn, normed, 0, 1)
        return self.module.attn.q_norm(query)

    def key_value(self, normed: Float[Tensor, "R n D"]) -> tuple[Tensor, Tensor]:
        key, value = self.projections(self.module.attn, normed, 1, 3)
        return self._grouped(self.module.attn.k_norm(key)), self._grouped(value)

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        query, key, value = self.projections(self.module.attn, normed, 0, 3)
        key = self._grouped(self.module.attn.k_norm(key))
        return QueryKeyValue(self.module.attn.q_norm(query), key, self._grouped(value))

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Rotated as the attention module does."""
        return apply_rot_embed_cat(heads, rotary, half=getattr(self.module.attn, "rotate_half", False))

    def _grouped(self, heads: Float[Tensor, "R n G d"]) -> Float[Tensor, "R n H d"]:
        """Grouped-query attention: each key or value repeated for the query heads of its group."""
        groups = getattr(self.module.attn, "num_kv_groups", 1)
        return heads if groups == 1 else heads.repeat_interleave(groups, 2)

    def _attended(self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        """Norm, gate and projection of the attention module."""
        attention = self.module.attn
        attended = attention.norm(attended)
        if attention.gate is not None:
            attended = attended * attention.gate(normed).sigmoid()
        return attention.proj_drop(attention.proj(attended))

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        return self.module.drop_path1, self.module.drop_path2


class _PreNorm(_TimmBlock):
    """`Block`: norm, attention, layer scale; norm, feed-forward, layer scale."""

    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        return self.module.norm1(tokens)

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]
    ) -> Float[Tensor, "R m D"]:
        return self._scaled(1, self._attended(attended, normed))

    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        return self._scaled(2, self.module.mlp(self.module.norm2(tokens)))

    def _scaled(self, update: int, values: Tensor) -> Tensor:
        """Layer scale of the first or second update."""
        return getattr(self.module, f"ls{update}")(values)


class _PostNorm(_TimmBlock):
    """`ResPostBlock`: attention, norm; feed-forward, norm."""

    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        """Attention reads the tokens as they are."""
        return tokens

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"]
    ) -> Float[Tensor, "R m D"]:
        return self.module.norm1(self._attended(attended, normed))

    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        return self.module.norm2(self.module.mlp(tokens))


class _EvaPreNorm(_PreNorm):
    """`EvaBlock`: norm, attention, gamma; norm, feed-forward, gamma; rotary positions."""

    parameters = ("rope", "attn_mask", "is_causal")

    def _scaled(self, update: int, values: Tensor) -> Tensor:
        gamma = getattr(self.module, f"gamma_{update}")
        return values if gamma is None else gamma * values


class _EvaPostNorm(_PostNorm):
    """`EvaBlockPostNorm`: the same with rotary positions."""

    parameters = ("rope", "attn_mask", "is_causal")


def _rotary(rope: Tensor, prefix: int) -> Float[Tensor, "B N H R"]:
    """Sines and cosines of all positions; for the prefix and for fused tokens, the identity: sine 0, cosine 1."""
    rows = rope[:, None] if rope.ndim == 2 else rope.movedim(-3, -2)  # [N, R]; [H, N, R] or [B, H, N, R]
    rows = rows[None] if rows.ndim == 3 else rows
    identity = torch.zeros_like(rows[:, :1])
    identity[..., rows.shape[-1] // 2 :] = 1
    return torch.cat((identity.expand(-1, prefix, -1, -1), rows, identity), 1)


def _fused(attention: Any, normed: Tensor, first: int, last: int) -> list[Tensor]:
    """Query, key and value projections number `first` to `last - 1`, by a part of `qkv` or by separate layers."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)[first:last]
        return [layer(normed).unflatten(-1, (-1, attention.head_dim)) for layer in layers]
    width = attention.num_heads * attention.head_dim
    part = linear_part(attention.qkv, normed, first * width, last * width)
    return list(part.unflatten(-1, (last - first, attention.num_heads, -1)).unbind(-3))


def _eva(attention: Any, normed: Tensor, first: int, last: int) -> list[Tensor]:
    """The same with separate biases of query and value."""
    parts = _fused(attention, normed, first, last)
    if attention.q_bias is None:
        return parts
    biases = (attention.q_bias, attention.k_bias, attention.v_bias)[first:last]
    return [part + bias.unflatten(-1, (attention.num_heads, -1)) for part, bias in zip(parts, biases, strict=True)]


def _names(known: Mapping[type[nn.Module], Any]) -> str:
    return f"one of {', '.join(kind.__name__ for kind in known)}"


_ATTENTIONS: Mapping[type[nn.Module], Callable[[Any, Tensor, int, int], list[Tensor]]] = MappingProxyType(
    {Attention: _fused, AttentionRope: _fused, EvaAttention: _eva}
)
_BLOCKS: Mapping[type[nn.Module], type[_TimmBlock]] = MappingProxyType(
    {Block: _PreNorm, ResPostBlock: _PostNorm, EvaBlock: _EvaPreNorm, EvaBlockPostNorm: _EvaPostNorm}
)
