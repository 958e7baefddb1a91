"""Vision transformers of Hugging Face transformers.

Layers are alike in all of them: norm, attention, norm, feed-forward. The names of the parts differ, and what stands
between them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.hosts.base import BlockCall, HostModel, added_for, first_of, pair, unsupported
from narrows.adapters.token_reduction.hosts.parts import (
    Parts,
    PartsBlock,
    half_rotary_rows,
    part_of,
    pool_by_attention,
    rotate_by_halves,
)
from narrows.adapters.token_reduction.tokens import with_mean_of_kept
from narrows.errors import InvalidArgument

_ATTENTION: Any = {"heads": "config.num_attention_heads", "scale": "scaling", "dropout": "attention_dropout"}
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_VIT = Parts(
    "layernorm_before",
    "attention",
    _SEPARATE,
    ("attention.o_proj", "dropout"),
    ("layernorm_after", "mlp", "dropout"),
    **_ATTENTION,
)
_BEIT = _VIT._replace(update=(*_VIT.update, "lambda_1"), feed_forward=(*_VIT.feed_forward, "lambda_2"))
_INTERNVL = _BEIT._replace(
    update=("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
    qk_norm=("q_norm", "k_norm"),
    norm_heads=False,
    scale="scale",
)
_VIDEOMAE = _VIT._replace(
    attention="attention.attention",
    qkv=("query", "key", "value"),
    update=("attention.output.dense", "attention.output.dropout"),
    feed_forward=("layernorm_after", "intermediate", "output.dense", "output.dropout"),
    dropout="dropout_prob",
)
_DATA2VEC = _VIDEOMAE._replace(
    update=(*_VIDEOMAE.update, "lambda_1"),
    feed_forward=("layernorm_after", "intermediate", "output", "lambda_2"),
    scale="",
    dropout="dropout",
)
_DINOV2 = _VIT._replace(
    norm="norm1", update=("attention.o_proj", "layer_scale1"), feed_forward=("norm2", "mlp", "layer_scale2")
)
_VJEPA2 = Parts(
    "norm1",
    "attention",
    ("query", "key", "value"),
    ("attention.proj",),
    ("norm2", "mlp"),
    **{**_ATTENTION, "dropout": "dropout_prob"},
)
_CLIP = Parts(
    "layer_norm1",
    "self_attn",
    _SEPARATE,
    ("self_attn.out_proj",),
    ("layer_norm2", "mlp"),
    heads="num_heads",
    scale="scale",
    dropout="dropout",
)
_BLIP = _CLIP._replace(qkv=("qkv",), update=("self_attn.projection",))
_BLIP2 = _BLIP._replace(dropout="attention_dropout")


class Family(NamedTuple):
    """Models that share an embedding and a layer.

    Args:
        layer: class of the layers.
        parts: names of the parts of a layer.
        prefix: tokens before the grid, registers not counted.
        takes_bias: whether a layer takes a mask.
        rest: what a layer returns beside its tokens; None where it returns them alone.
        mean_pooled: whether the tower itself pools the grid if its configuration says so, and its head reads that.
        own: in a layer, the module that makes relative positions.
        shared: argument of a layer by which relative positions come that all layers share.
    """

    layer: str
    parts: Parts
    prefix: int
    takes_bias: bool = True
    rest: tuple[Any, ...] | None = None
    mean_pooled: bool = False
    own: str = ""
    shared: str = ""


# By the class of the embedding: of a multimodal model only the vision tower has one of these.
FAMILIES = {
    "vit.modeling_vit.ViTEmbeddings": Family("ViTLayer", _VIT, 1),
    "vit_mae.modeling_vit_mae.ViTMAEEmbeddings": Family("ViTMAELayer", _VIT, 1),
    "vit_msn.modeling_vit_msn.ViTMSNEmbeddings": Family("ViTMSNLayer", _VIT, 1),
    "ijepa.modeling_ijepa.IJepaEmbeddings": Family("IJepaLayer", _VIT, 0),
    "deit.modeling_deit.DeiTEmbeddings": Family("DeiTLayer", _VIT, 2),
    "beit.modeling_beit.BeitEmbeddings": Family(
        "BeitLayer", _BEIT, 1, mean_pooled=True, own="relative_position_bias", shared="attention_mask"
    ),
    "data2vec.modeling_data2vec_vision.Data2VecVisionEmbeddings": Family(
        "Data2VecVisionLayer",
        _DATA2VEC,
        1,
        rest=(),
        mean_pooled=True,
        own="attention.attention.relative_position_bias",
        shared="relative_position_bias",
    ),
    "dinov2.modeling_dinov2.Dinov2Embeddings": Family("Dinov2Layer", _DINOV2, 1),
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersEmbeddings": Family(
        "Dinov2WithRegistersLayer", _DINOV2, 1
    ),
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTEmbeddings": Family(
        "DINOv3ViTLayer", _DINOV2._replace(dropout="dropout"), 1
    ),
    "clip.modeling_clip.CLIPVisionEmbeddings": Family("CLIPEncoderLayer", _CLIP, 1),
    "metaclip_2.modeling_metaclip_2.MetaClip2VisionEmbeddings": Family("MetaClip2EncoderLayer", _CLIP, 1),
    "altclip.modeling_altclip.AltCLIPVisionEmbeddings": Family("AltCLIPEncoderLayer", _CLIP, 1),
    "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionEmbeddings": Family("ChineseCLIPVisionLayer", _CLIP, 1),
    "blip.modeling_blip.BlipVisionEmbeddings": Family("BlipEncoderLayer", _BLIP, 1, takes_bias=False),
    "blip_2.modeling_blip_2.Blip2VisionEmbeddings": Family("Blip2EncoderLayer", _BLIP2, 1, takes_bias=False),
    "instructblip.modeling_instructblip.InstructBlipVisionEmbeddings": Family(
        "InstructBlipEncoderLayer", _BLIP2, 1, takes_bias=False
    ),
    "clipseg.modeling_clipseg.CLIPSegVisionEmbeddings": Family("CLIPSegEncoderLayer", _CLIP, 1),
    "git.modeling_git.GitVisionEmbeddings": Family("GitVisionEncoderLayer", _CLIP, 1),
    "owlvit.modeling_owlvit.OwlViTVisionEmbeddings": Family("OwlViTEncoderLayer", _CLIP, 1),
    "owlv2.modeling_owlv2.Owlv2VisionEmbeddings": Family("Owlv2EncoderLayer", _CLIP, 1),
    "siglip.modeling_siglip.SiglipVisionEmbeddings": Family("SiglipEncoderLayer", _CLIP, 0),
    "siglip2.modeling_siglip2.Siglip2VisionEmbeddings": Family("Siglip2EncoderLayer", _CLIP, 0),
    "idefics3.modeling_idefics3.Idefics3VisionEmbeddings": Family("Idefics3EncoderLayer", _CLIP, 0),
    "smolvlm.modeling_smolvlm.SmolVLMVisionEmbeddings": Family("SmolVLMEncoderLayer", _CLIP, 0),
    "internvl.modeling_internvl.InternVLVisionEmbeddings": Family(
        "InternVLVisionLayer", _INTERNVL, 1, takes_bias=False
    ),
    "videomae.modeling_videomae.VideoMAEEmbeddings": Family("VideoMAELayer", _VIDEOMAE, 0, takes_bias=False),
    "vjepa2.modeling_vjepa2.VJEPA2Embeddings": Family("VJEPA2Layer", _VJEPA2, 0, takes_bias=False, rest=(None,)),
}


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is the vision tower of a model of these families."""
    # Its own: wrappers such as peft's have the attributes of what they wrap.
    family = FAMILIES.get(_class_name(module._modules.get("embeddings")))
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
        layer, family = self.blocks[index], self._family
        attention = part_of(layer, family.parts.attention)
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        if family.layer not in kinds or not hasattr(attention, family.parts.qkv[0]):
            raise unsupported(f"layer {index}", layer, f"{family.layer}, as in transformers 5.23")
        if family.own:
            return RelativeBlock(layer, family)
        return (VJEPA2Block if family.parts is _VJEPA2 else TransformersBlock)(layer, family)

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        _check_no_attentions(kwargs.get("output_attentions"))
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
    def class_token(self) -> bool:
        # torch.compile takes a property of `super()` for true.
        return self.prefix > 0 and not (self._family.mean_pooled and self._config.use_mean_pooling)

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        """Attention pooling, or a pooler that averages."""
        pooler = getattr(self.module, "pooler", None) if self._family.mean_pooled else self._pooling(self.module)
        return () if pooler is None else ((pooler, "forward"),)

    @property
    def between(self) -> Sequence[nn.Module]:
        norms = (getattr(self.module, name, None) for name in ("layernorm", "post_layernorm", "norm"))
        return [norm for norm in norms if norm is not None]

    def averaging(self, model: nn.Module) -> Sequence[nn.Module]:
        return [module for module in model.modules() if type(module).__name__ in _AVERAGING]

    def averageable(self, result: Any, kwargs: dict[str, Any]) -> Any:
        """Dropped tokens become the mean of kept ones, of which padding is none."""
        real = kwargs.get("pixel_attention_mask")
        states = with_mean_of_kept(result[0], self.prefix, None if real is None else real.bool())
        if isinstance(result, tuple):
            return (states, *result[1:])
        result.last_hidden_state = states
        return result

    def stale_heads(self, model: nn.Module) -> Sequence[str]:
        """Heads that read all tokens, or the first of a grid."""
        stale = {"VJEPA2AttentivePooler", "IJepaPooler"}
        if not getattr(self._config, "use_mean_pooling", True):
            stale.add("VideoMAEForVideoClassification")
        return [type(head).__name__ for head in model.modules() if type(head).__name__ in stale]

    def pool(self, module: Any, own: Callable[..., Any], query: Tensor, *args: Tensor, **kwargs: Any) -> Any:
        """The head's pooling, over kept tokens only."""
        if self._family.mean_pooled:
            return own(with_mean_of_kept(query, self.prefix), *args, **kwargs)
        return pool_by_attention(own, query, *args, **kwargs)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        of_patch = pair(self._config.patch_size)
        return height // of_patch[0], width // of_patch[1]

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """Frames of a video one below another; None of tokens that do not lie in a grid, all of them, in order."""
        if self.drops_patches or images.ndim not in (4, 5):
            return None
        height, width = self.token_grid(images.shape[-2], images.shape[-1])
        return (height if images.ndim == 4 else max(images.shape[1] // self._config.tubelet_size, 1) * height), width

    @property
    def num_tokens(self) -> int:
        height, width = self.token_grid(*self.image_size)
        return int(height * width * (1 - getattr(self._config, "mask_ratio", 0.0)))

    @property
    def drops_patches(self) -> bool:
        """Patches that are cut already come in any number, and masked autoencoders see a few in any order."""
        return hasattr(self._config, "num_patches") or hasattr(self._config, "mask_ratio")

    def _pooling(self, module: Any) -> nn.MultiheadAttention | None:
        return None if self.class_token or not hasattr(module, "head") else module.head.attention

    @property
    def _frames(self) -> int:
        """Of a video; 0 of images."""
        return getattr(self._config, "num_frames", getattr(self._config, "frames_per_clip", 0))

    def _image_size(self) -> tuple[int, int]:
        config = self._config
        if hasattr(config, "num_patches"):
            side = math.isqrt(config.num_patches) * config.patch_size
            return side, side
        height, width = pair(config.crop_size if hasattr(config, "crop_size") else config.image_size)
        return (self._frames // config.tubelet_size * height if self._frames else height), width

    def example(self, batch: int) -> dict[str, Tensor]:
        config, (height, width) = self._config, pair(self._config.patch_size)
        channels = getattr(config, "in_chans", getattr(config, "num_channels", 3))
        if self._frames:
            size = pair(config.crop_size if hasattr(config, "crop_size") else config.image_size)
            name = "pixel_values_videos" if hasattr(config, "crop_size") else "pixel_values"
            return {name: self.random_images(batch, self._frames, channels, *size)}
        if hasattr(config, "mask_ratio"):
            noise = self.random_images(batch, 1, *self.token_grid(*self.image_size)).flatten(1)
            return {"pixel_values": self.random_images(batch, channels), "noise": noise}
        if not hasattr(config, "num_patches"):
            return {"pixel_values": self.random_images(batch, channels)}
        num_patches = config.num_patches  # takes patches, and the grid of each image
        patches = self.random_images(batch, num_patches, channels * height * width)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(batch, num_patches, dtype=torch.long, device=patches.device),
            "spatial_shapes": torch.full((batch, 2), math.isqrt(num_patches), device=patches.device),
        }


class TransformersBlock(PartsBlock):
    """One layer of a model of transformers."""

    def __init__(self, module: Any, family: Family) -> None:
        super().__init__(module, family.parts)
        self.takes_bias, self._family = family.takes_bias, family

    def result(self, given: Any, tokens: Float[Tensor, "B N D"]) -> Any:
        return tokens if self._family.rest is None else (tokens, *self._family.rest)

    @property
    def fused(self) -> bool:
        return self.attention.config._attn_implementation != "eager"

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
        _check_no_attentions(kwargs.get("output_attentions", self.attention.config.output_attentions))
        for name, value in kwargs.items():
            if name not in _HARMLESS and value is not None:
                raise InvalidArgument(name, expected="no such argument for a reduced model", got=repr(value))
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
            raise InvalidArgument(
                "attention_mask",
                expected="a mask [B, 1, N, N]",
                got=f"a {type(attention_mask).__name__} for {self.attention.config._attn_implementation!r}",
                hint="Use model.set_attn_implementation('sdpa').",
            )
        return BlockCall(position_embeddings, attention_mask)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("attention_mask", "position_embeddings"), args[1:], strict=False)), **kwargs}
        if bias is not None:
            if bias.dtype == torch.bool and not self.fused:
                bias = added_for(bias, first_of(args, kwargs).dtype)
            given["attention_mask"] = bias.expand(-1, -1, bias.shape[-1], -1)
        elif isinstance(given.get("attention_mask"), Tensor):  # a full mask of the whole grid
            given["attention_mask"] = None
        if rotary is not None:
            given["position_embeddings"] = tuple(rotary[:, None, prefix:, 0].chunk(2, -1))
        return args[:1], given

    def mask_of(self, bias: Any, width: int) -> Tensor:
        return bias.expand(-1, -1, width, -1)

    def rotary_rows(self, rotary: tuple[Tensor, Tensor], width: int, prefix: int) -> Float[Tensor, "1 M 1 R"]:
        """Cosines beside sines for the prefix, the grid, and fused tokens; the identity where there is no position."""
        return half_rotary_rows(*rotary, width)

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Queries or keys with rotary embeddings applied; `rotary` holds cosines beside sines."""
        return rotate_by_halves(heads, rotary)


class RelativeBlock(TransformersBlock):
    """A layer that adds relative positions to the logits of attention: its own, or those that all layers share."""

    @property
    def _own(self) -> nn.Module | None:
        return part_of(self.module, self._family.own)

    @property
    def takes_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of its own it makes those of the whole grid."""
        return self._own is None

    def arguments(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> BlockCall:
        """What the layer was called with; its own relative positions are made for the size of the images."""
        config, name = self.attention.config, self._family.shared
        relative = kwargs.pop(name, None) if config.use_shared_relative_position_bias else None
        if relative is not None and relative.shape[0] > 1:  # a mask is in it
            kwargs[name], relative = relative, None
        resolution = kwargs.pop("resolution", None)
        kwargs.pop("interpolate_pos_encoding", None)
        call = super().arguments(hidden_states, *args, **kwargs)
        if self._own is not None:
            assert resolution is not None, "the layer itself needs it"
            own = self._own(tuple(side // config.patch_size for side in resolution))
            relative = own if relative is None else own + relative
        return call._replace(relative=relative)

    def unmasked(self, call: BlockCall) -> BlockCall:
        """Relative positions that all layers share have the full mask added to them: truth values, but for "eager"."""
        if call.bias is None or not self.attention.config.use_shared_relative_position_bias:
            return super().unmasked(call)
        shared = call.bias[:1] - 1.0 * self.fused
        return call._replace(bias=None, relative=shared if call.relative is None else call.relative + shared)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, given = super().narrowed(args, kwargs, rotary, bias, prefix)
        bias = given.pop("attention_mask", None)
        return args, {**given, self._family.shared: bias}


class VJEPA2Block(TransformersBlock):
    """A layer of V-JEPA 2, which rotates by frame, row and column, worked out from the numbers of the tokens."""

    def arguments(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> BlockCall:
        given = {**dict(zip(("position_mask",), args, strict=True)), **kwargs} if args else kwargs
        return super().arguments(hidden_states, **given)._replace(rotary=_NUMBERS)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert rotary is not None
        return args[:1], {**kwargs, "position_mask": rotary[..., 0, 0]}

    def rotary_rows(self, rotary: Any, width: int, prefix: int) -> Int[Tensor, "1 M 1 1"]:
        """The numbers of the tokens; a fused one takes that of the first, by which nothing rotates."""
        return F.pad(torch.arange(width, device=self.module.norm1.weight.device), (0, 1))[None, :, None, None]

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        numbers = self.attention.get_position_ids(heads, masks=rotary[..., 0, 0])
        return self.attention.apply_rotary_embeddings(heads.transpose(1, 2), numbers).transpose(1, 2)


_NUMBERS = "by number"
# Heads that average over the grid in their own forward.
_AVERAGING = {
    f"{family}ForImageClassification"
    for family in ("Dinov2", "Dinov2WithRegisters", "CLIP", "MetaClip2", "Siglip", "Siglip2", "IJepa")
} | {"VideoMAEForVideoClassification"}
# Arguments that do not change what a layer computes.
_HARMLESS = {"output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch"}


def _check_no_attentions(asked: bool | None) -> None:
    if asked:
        raise InvalidArgument(
            "output_attentions",
            expected="False for a reduced model, which computes no attention between all tokens",
            got=True,
            hint="Call remove() on the reduction first.",
        )
