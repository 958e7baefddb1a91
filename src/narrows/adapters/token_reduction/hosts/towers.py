"""Vision transformers recognised by their make, whoever's copy it is.

OpenAI's CLIP and open_clip's, torchvision's `vit_*`, DINOv2 and DINOv3 as `torch.hub` loads them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.hosts.base import BlockCall, HostModel, pair, unsupported
from narrows.adapters.token_reduction.hosts.parts import (
    Parts,
    PartsBlock,
    half_rotary_rows,
    part_of,
    pool_by_attention,
    rotate_by_halves,
)
from narrows.adapters.token_reduction.tokens import kept_mask_of, with_mean_of_kept
from narrows.errors import InvalidArgument

_CLIP = Parts(
    "ln_1", "attn", ("in_proj_weight",), ("attn.out_proj", "ls_1"), ("ln_2", "mlp", "ls_2"), dropout="dropout"
)
_OPEN_CLIP = _CLIP._replace(
    update=("attn.ln_inner", "attn.out_proj", "attn.out_drop", "ln_attn", "ls_1"),
    qk_norm=("ln_q", "ln_k"),
    dropout="attn_drop",
)
_TORCHVISION = _CLIP._replace(
    attention="self_attention", update=("self_attention.out_proj", "dropout"), feed_forward=("ln_2", "mlp")
)
_DINO = Parts(
    "norm1",
    "attn",
    ("qkv",),
    ("attn.proj", "attn.proj_drop", "ls1"),
    ("norm2", "mlp", "ls2"),
    scale="scale",
    drop_path="drop_path1",
)
# By the names of block and attention.
_BLOCKS = {
    ("ResidualAttentionBlock", "MultiheadAttention"): _CLIP,
    ("CustomResidualAttentionBlock", "Attention"): _OPEN_CLIP,
    ("EncoderBlock", "MultiheadAttention"): _TORCHVISION,
    ("Block", "Attention"): _DINO,
    ("Block", "MemEffAttention"): _DINO,
    ("NestedTensorBlock", "MemEffAttention"): _DINO,
    ("SelfAttentionBlock", "SelfAttention"): _DINO,
}
# Settings of attention that its parts do not show, and what they are in a plain one.
_PLAIN = {"bias_k": None, "add_zero_attn": False, "logit_scale": None, "head_scale": None}


def recognise(module: nn.Module) -> HostModel | None:
    """The module as a host if it is of one of these makes."""
    if any(kind.__name__ == "DinoVisionTransformer" for kind in type(module).__mro__):
        return DinoModel(module)
    # Parameters of its own: wrappers such as peft's have the attributes of what they wrap.
    if "class_embedding" in module._parameters and hasattr(part_of(module, "transformer.resblocks"), "__len__"):
        return ClipModel(module)
    if "class_token" in module._parameters and hasattr(part_of(module, "encoder.layers"), "__len__"):
        return TorchvisionModel(module)
    return None


class _Tower(HostModel):
    """A vision transformer with a class token."""

    homes: Sequence[str] = ()  # packages whose own `forward` reads the class token alone

    def block(self, index: int) -> "TowerBlock":
        """The block at `index`.

        Raises:
            InvalidType: it is of another make.
        """
        module = self.blocks[index]
        for (block, attention), parts in _BLOCKS.items():
            of = part_of(module, parts.attention)
            if (type(module).__name__, type(of).__name__) == (block, attention):
                masked = getattr(module, "attn_mask", None) is not None
                odd = masked or any(getattr(of, name, plain) is not plain for name, plain in _PLAIN.items())
                if not odd and part_of(of, parts.qkv[0]) is not None:
                    return TowerBlock(module, parts)
        known = " or ".join(sorted({f"{block} with {attention}" for block, attention in _BLOCKS}))
        raise unsupported(f"block {index}", module, f"{known}, without a mask or a bias of its own")

    def _is_own(self, module: nn.Module) -> bool:
        return type(module).forward.__module__.partition(".")[0] in self.homes

    @property
    def _patch(self) -> tuple[int, int]:
        size: Any = self.embedding.patch_size if hasattr(self.embedding, "patch_size") else self.module.patch_size
        return pair(size)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self._patch[0], width // self._patch[1]

    def example(self, batch: int) -> dict[str, Tensor]:
        first = next(part for part in self.embedding.modules() if isinstance(part, nn.Conv2d))
        return {"x": self.random_images(batch, first.in_channels)}


class ClipModel(_Tower):
    """The image tower of OpenAI's CLIP, of open_clip's and of CoCa."""

    homes = ("clip", "open_clip")

    def __init__(self, module: Any) -> None:
        size = module.image_size if hasattr(module, "image_size") else module.input_resolution
        super().__init__(
            module, blocks=module.transformer.resblocks, prefix=1, embedding=module.conv1, image_size=pair(size)
        )
        self.entries = tuple(name for name in ("forward", "forward_intermediates") if hasattr(module, name))

    @property
    def _patch(self) -> tuple[int, int]:
        return pair(self.module.conv1.stride)

    @property
    def class_token(self) -> bool:
        return not self._poolers and getattr(self.module, "pool_type", "tok") == "tok"

    @property
    def _poolers(self) -> list[Any]:
        """Attention pooling, of which CoCa may have two."""
        poolers = (getattr(self.module, name, None) for name in ("attn_pool", "attn_pool_contrastive"))
        return [pooler for pooler in poolers if pooler is not None]

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        if name == "forward_intermediates":
            return "blocks"
        alone = self.class_token and not getattr(module, "output_tokens", False)
        return "special" if alone and self._is_own(module) else "grid"

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        average = [(self.module, "_global_pool")] if hasattr(self.module, "_global_pool") else []
        return [*average, *((pooler.attn, "forward") for pooler in self._poolers)]

    @property
    def between(self) -> Sequence[nn.Module]:
        return [self.module.ln_post, *(pooler.ln_k for pooler in self._poolers)]

    def pool(self, module: Any, own: Callable[..., Any], x: Tensor, *args: Tensor, **kwargs: Any) -> Any:
        """Attention over kept tokens, or their mean; the tokens that are returned beside it are those of the grid."""
        if isinstance(module, nn.MultiheadAttention):
            return pool_by_attention(own, x, *args, **kwargs)
        if kept_mask_of(x) is None:
            return own(x)
        (pooled, _), (_, tokens) = own(with_mean_of_kept(x, self.prefix)), own(x)
        return pooled, tokens


class TorchvisionModel(_Tower):
    """A `vit_*` of torchvision."""

    homes = ("torchvision",)

    def __init__(self, module: Any) -> None:
        super().__init__(
            module,
            blocks=module.encoder.layers,
            prefix=1,
            embedding=module.conv_proj,
            image_size=pair(module.image_size),
        )

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        return "special" if self._is_own(module) else "grid"


class DinoModel(_Tower):
    """DINOv2 or DINOv3 as `torch.hub` loads them."""

    entries = ("forward", "forward_features", "get_intermediate_layers")
    homes = ("dinov2", "dinov3")

    def __init__(self, module: Any) -> None:
        chunks = (chunk if isinstance(chunk, nn.ModuleList) else [chunk] for chunk in module.blocks)
        registers = getattr(module, "num_register_tokens", getattr(module, "n_storage_tokens", 0))
        super().__init__(
            module,
            blocks=[block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)],
            prefix=1 + registers,
            embedding=module.patch_embed,
            image_size=pair(module.patch_embed.img_size),
        )

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        if name == "get_intermediate_layers":
            return "blocks"
        alone = name == "forward" and not kwargs.get("is_training", False)
        return "special" if alone and self._is_own(module) else "grid"

    @property
    def between(self) -> Sequence[nn.Module]:
        return (self.module.norm,)

    def averaging(self, model: nn.Module) -> Sequence[nn.Module]:
        """The linear classifiers of the hub, of features after the last block."""
        return [part for part in model.modules() if _averages(part) and getattr(part, "layers", 1) == 1]

    def averageable(self, result: Any, kwargs: dict[str, Any]) -> Any:
        """Features whose mean is that of kept tokens."""
        if not isinstance(result, dict) or kept_mask_of(result["x_prenorm"]) is None:
            return result
        states = with_mean_of_kept(self.module.norm(result["x_prenorm"]), self.prefix)
        return {**result, "x_norm_patchtokens": states[:, self.prefix :]}

    def stale_heads(self, model: nn.Module) -> Sequence[str]:
        """Those of the features after several blocks."""
        stale = (part for part in model.modules() if _averages(part) and getattr(part, "layers", 1) != 1)
        return [f"{type(part).__name__} of {part.layers} layers" for part in stale]


# No cosine: where there is no position.
_STILL = 2.0


def _averages(module: nn.Module) -> bool:
    return type(module).__name__ == "_LinearClassifierWrapper"


class TowerBlock(PartsBlock):
    """A block of these makes."""

    takes_bias = False

    @property
    def sequence_first(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `nn.MultiheadAttention` is by default."""
        return isinstance(self.attention, nn.MultiheadAttention) and not self.attention.batch_first

    def tokens(self, holder: Any) -> Tensor:
        """The tokens, alone or in a list of one."""
        if isinstance(holder, list) and len(holder) != 1:
            raise InvalidArgument("x", expected="one batch of images", got=f"a list of {len(holder)} (crops)")
        return super().tokens(holder)

    def arguments(self, x: Any, rope: Any = None, *args: Any, **kwargs: Any) -> BlockCall:
        """What the block was called with: sines and cosines for DINOv3, alone or in a list of one; no masks."""
        if "rope_or_rope_list" in kwargs:
            rope = kwargs.pop("rope_or_rope_list")
        rope = rope[0] if isinstance(rope, list) else rope
        if any(given is not None for given in (*args, *kwargs.values())) or isinstance(rope, Tensor):
            raise InvalidArgument(
                "attn_mask",
                expected="no mask, and no other keys, for a reduced model",
                got="one",
                hint="remove() the reduction first.",
            )
        return BlockCall(rope)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if rotary is None:
            return args, kwargs
        cosine, sine = rotary[:, None, prefix:, 0].clamp_max(1).chunk(2, -1)
        return (args[0], [(sine, cosine)] if isinstance(args[0], list) else (sine, cosine)), {}

    def rotary_rows(self, rotary: tuple[Tensor, Tensor], width: int, prefix: int) -> Float[Tensor, "1 M 1 R"]:
        sine, cosine = rotary
        return half_rotary_rows(cosine, sine, width, still=_STILL)

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Tensor) -> Float[Tensor, "R n H d"]:
        """Rotated in the precision of sines and cosines, which what does not rotate is not rounded to."""
        rotated = rotate_by_halves(heads.to(rotary.dtype), rotary).to(heads.dtype)
        return rotated.where(rotary[..., :1] <= 1, heads)
