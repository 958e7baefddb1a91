"""Vision transformers of Hugging Face transformers.

Layers are alike in all of them: norm, attention with separate projections, norm, feed-forward. The names of the parts
differ, and what stands between them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel, QueryKeyValue, unsupported
from narrows.adapters.token_reduction.tokens import kept_mask_of, pool_kept
from narrows.errors import InvalidArgument


class Parts(NamedTuple):
    """Attribute names in the layers of a family.

    Args:
        attention: holds `q_proj`, `k_proj`, `v_proj`.
        norms: before attention and before the feed-forward.
        output: the projection that ends attention.
        scale: factor of the attention logits.
        dropout: probability for attention weights.
        after: modules that each of the two updates passes before it is added.
    """

    attention: str
    norms: tuple[str, str]
    output: str
    scale: str
    dropout: str
    after: tuple[str, ...] = ()


_VIT = Parts(
    "attention",
    ("layernorm_before", "layernorm_after"),
    "o_proj",
    "scaling",
    "attention_dropout",
    ("dropout", "dropout"),
)
_DINOV2 = Parts(
    "attention", ("norm1", "norm2"), "o_proj", "scaling", "attention_dropout", ("layer_scale1", "layer_scale2")
)
_DINOV3 = _DINOV2._replace(dropout="dropout")
_CLIP = Parts("self_attn", ("layer_norm1", "layer_norm2"), "out_proj", "scale", "dropout")


class Family(NamedTuple):
    """Models that share an embedding and a layer.

    Args:
        layer: class of the layers.
        parts: attribute names in a layer.
        prefix: tokens before the grid, registers not counted.
    """

    layer: str
    parts: Parts
    prefix: int


# By the class of the embedding: of a multimodal model only the vision tower has one of these.
FAMILIES = {
    "vit.modeling_vit.ViTEmbeddings": Family("ViTLayer", _VIT, 1),
    "deit.modeling_deit.DeiTEmbeddings": Family("DeiTLayer", _VIT, 2),
    "dinov2.modeling_dinov2.Dinov2Embeddings": Family("Dinov2Layer", _DINOV2, 1),
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersEmbeddings": Family(
        "Dinov2WithRegistersLayer", _DINOV2, 1
    ),
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTEmbeddings": Family("DINOv3ViTLayer", _DINOV3, 1),
    "clip.modeling_clip.CLIPVisionEmbeddings": Family("CLIPEncoderLayer", _CLIP, 1),
    "siglip.modeling_siglip.SiglipVisionEmbeddings": Family("SiglipEncoderLayer", _CLIP, 0),
    "siglip2.modeling_siglip2.Siglip2VisionEmbeddings": Family("Siglip2EncoderLayer", _CLIP, 0),
}


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is the vision tower of a model of these families."""
    family = FAMILIES.get(_class_name(getattr(module, "embeddings", None)))
    return None if family is None else TransformersModel(module, family)


def _class_name(module: object) -> str:
    """The class of a module as a key of `FAMILIES`."""
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("transformers.models.")


class TransformersModel(HostModel):
    """The vision tower of a model of transformers."""

    def __init__(self, module: Any, family: Family) -> None:
        # The first list of modules in a tower is that of its layers.
        layers = next(child for child in module.modules() if isinstance(child, nn.ModuleList))
        self._family, self._config = family, module.config
        super().__init__(
            module,
            blocks=layers,
            prefix=family.prefix + (getattr(module.config, "num_register_tokens", 0) if family.prefix else 0),
            embedding=module.embeddings,
            image_size=self._image_size(),
        )

    def block(self, index: int) -> "TransformersBlock":
        """The layer at `index`.

        Raises:
            InvalidType: it is not of the class that its family has.
        """
        layer = self.blocks[index]
        attention = getattr(layer, self._family.parts.attention, None)
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        if self._family.layer not in kinds or not hasattr(attention, "q_proj"):
            raise unsupported(f"layer {index}", layer, f"{self._family.layer}, as in transformers 5.23")
        return TransformersBlock(layer, self._family.parts)

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        states = kwargs.get("output_hidden_states")
        states = getattr(module.config, "output_hidden_states", False) if states is None else states
        return "blocks" if states is not False or hasattr(module, "out_features") else "grid"

    def pooling_logits(self, module: Any, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """Under attention pooling, logits of its probe."""
        attention = self._pooling(module)
        if attention is None:
            return None
        (query_weight, key_weight, _), (query_bias, key_bias, _) = (
            stacked.chunk(3) for stacked in (attention.in_proj_weight, attention.in_proj_bias)
        )
        heads = (attention.num_heads, attention.head_dim)
        query = F.linear(module.head.probe[0, 0], query_weight, query_bias).unflatten(0, heads)
        key = F.linear(module.post_layernorm(tokens), key_weight, key_bias).unflatten(-1, heads)
        return (key * query).sum(-1) / math.sqrt(attention.head_dim)

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        """Attention pooling."""
        attention = self._pooling(self.module)
        return () if attention is None else ((attention, "forward"),)

    @property
    def between(self) -> Sequence[nn.Module]:
        norms = (getattr(self.module, name, None) for name in ("layernorm", "post_layernorm", "norm"))
        return [norm for norm in norms if norm is not None]

    def averaging(self, model: nn.Module) -> Sequence[nn.Module]:
        return [module for module in model.modules() if type(module).__name__ in _AVERAGING]

    def averageable(self, result: Any, kwargs: dict[str, Any]) -> Any:
        """Dropped tokens become the mean of kept ones, of which padding is none."""
        states = result[0]
        kept = kept_mask_of(states)
        if kept is None:
            return result
        tokens, kept = states[:, self.prefix :], kept[:, self.prefix :]
        real = kwargs.get("pixel_attention_mask")
        mean = pool_kept(tokens, kept if real is None else kept & real.bool(), "avg")
        states = torch.cat((states[:, : self.prefix], torch.where(kept[..., None], tokens, mean[:, None])), 1)
        if isinstance(result, tuple):
            return (states, *result[1:])
        result.last_hidden_state = states
        return result

    def pool(
        self, module: Any, own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The head's attention pooling, over kept tokens only."""
        kept = kept_mask_of(key)
        if kept is not None:
            kwargs["key_padding_mask"] = key.new_zeros(kept.shape).masked_fill(~kept, -torch.inf)
        return own(query, key, value, **kwargs)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        of_patch = _pair(self._config.patch_size)
        return height // of_patch[0], width // of_patch[1]

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """None of patches that are cut already: each image has its own grid, and padding."""
        return super().grid_of(images) if images.ndim == 4 else None

    @property
    def drops_patches(self) -> bool:
        """Patches that are cut already come in any number."""
        return hasattr(self._config, "num_patches")

    def _pooling(self, module: Any) -> nn.MultiheadAttention | None:
        return None if self.class_token or not hasattr(module, "head") else module.head.attention

    def _image_size(self) -> tuple[int, int]:
        if hasattr(self._config, "image_size"):
            return _pair(self._config.image_size)
        side = math.isqrt(self._config.num_patches) * self._config.patch_size
        return side, side

    def example(self, batch: int) -> dict[str, Tensor]:
        channels, (height, width) = self._config.num_channels, _pair(self._config.patch_size)
        if not hasattr(self._config, "num_patches"):
            return {"pixel_values": self.random_images(batch, channels)}
        num_patches = self._config.num_patches  # takes patches, and the grid of each image
        patches = self.random_images(batch, num_patches, channels * height * width)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(batch, num_patches, dtype=torch.long, device=patches.device),
            "spatial_shapes": torch.full((batch, 2), math.isqrt(num_patches), device=patches.device),
        }


class TransformersBlock(HostBlock):
    """One layer of a model of transformers."""

    def __init__(self, module: Any, parts: Parts) -> None:
        super().__init__(module)
        self._parts = parts

    @property
    def _attention(self) -> Any:
        return getattr(self.module, self._parts.attention)

    @property
    def scale(self) -> float:
        return getattr(self._attention, self._parts.scale)

    @property
    def dropout(self) -> float:
        return getattr(self._attention, self._parts.dropout) if self.module.training else 0.0

    @property
    def fused(self) -> bool:
        return self._attention.config._attn_implementation != "eager"

    @property
    def bypassed(self) -> Sequence[nn.Module]:
        return (self._attention,)

    def arguments(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> BlockCall:
        """What the layer was called with.

        Raises:
            InvalidArgument: attention weights are asked for, the mask is made for another attention implementation, or
                an argument is unknown.
        """
        if kwargs.get("output_attentions", self._attention.config.output_attentions):
            raise InvalidArgument(
                "output_attentions",
                expected="False for a reduced model, which computes no attention between all tokens",
                got=True,
                hint="Call remove() on the reduction first.",
            )
        for name, value in kwargs.items():
            if name not in _HARMLESS and value is not None:
                raise InvalidArgument(name, expected="no such argument for a reduced model", got=repr(value))
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
            raise InvalidArgument(
                "attention_mask",
                expected="a mask [B, 1, N, N]",
                got=f"a {type(attention_mask).__name__} for {self._attention.config._attn_implementation!r}",
                hint="Use model.set_attn_implementation('sdpa').",
            )
        return BlockCall(position_embeddings, attention_mask)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("attention_mask", "position_embeddings"), args[1:], strict=False)), **kwargs}
        if bias is not None:
            if bias.dtype == torch.bool and not self.fused:
                like = self._attention.q_proj.weight
                bias = torch.where(bias, 0.0, torch.finfo(like.dtype).min).to(like.dtype)
            given["attention_mask"] = bias.expand(-1, -1, bias.shape[-1], -1)
        if rotary is not None:
            given["position_embeddings"] = tuple(rotary[:, None, prefix:, 0].chunk(2, -1))
        return args[:1], given

    def mask_of(self, bias: Any, width: int) -> Tensor:
        return bias.expand(-1, -1, width, -1)

    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        return self._part(self._parts.norms[0], tokens)

    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        attention = self._attention
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = attention.config.num_attention_heads
        return QueryKeyValue(*(layer(normed).unflatten(-1, (heads, -1)) for layer in layers))

    def rotary_rows(self, rotary: tuple[Tensor, Tensor], width: int, prefix: int) -> Float[Tensor, "1 M 1 R"]:
        """Cosines beside sines for the prefix, the grid, and fused tokens; the identity where there is no position."""
        cosine, sine = rotary
        around = (0, 0, width - len(cosine), 1)
        rows = torch.cat((F.pad(cosine, around, value=1.0), F.pad(sine, around)), -1)
        return rows[None, :, None]

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Queries or keys with rotary embeddings applied; `rotary` holds cosines beside sines."""
        cosine, sine = rotary.chunk(2, -1)
        first, second = heads.chunk(2, -1)
        return heads * cosine + torch.cat((-second, first), -1) * sine

    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"] | None
    ) -> Float[Tensor, "R m D"]:
        return self._after(0, getattr(self._attention, self._parts.output)(attended))

    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        return self._after(1, self._part("mlp", self._part(self._parts.norms[1], tokens)))

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two updates, which share one module."""
        drop_path = getattr(self.module, "drop_path", None)
        return super().drop_paths() if drop_path is None else (drop_path, drop_path)

    def _part(self, name: str, tokens: Tensor) -> Tensor:
        return self.module.get_submodule(name)(tokens)

    def _after(self, update: int, tokens: Tensor) -> Tensor:
        return self._part(self._parts.after[update], tokens) if self._parts.after else tokens


# Heads that average over the grid in their own forward.
_AVERAGING = {
    f"{family}ForImageClassification" for family in ("Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip", "Siglip2")
}
# Arguments that do not change what a layer computes.
_HARMLESS = {"output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch"}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
