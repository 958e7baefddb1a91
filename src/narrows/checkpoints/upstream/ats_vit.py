"""`vit_pytorch.ats_vit.ViT`."""

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.models import ATSViT

_PREFIXES = {
    "cls_token": "embedding.class_token",
    "pos_embedding": "embedding.positions",
    "to_patch_embedding.1.": "embedding.stem.patch_norm.",
    "to_patch_embedding.2.": "embedding.stem.linear.",
    "to_patch_embedding.3.": "embedding.stem.token_norm.",
    "mlp_head.0.": "norm.",
    "mlp_head.1.": "head.",
}
_BLOCK_PREFIXES = {
    "0.norm.": "attention_norm.",
    "0.to_qkv.": "attention.qkv.",
    "0.to_out.0.": "attention.out.",
    "1.net.0.": "feed_forward_norm.",
    "1.net.1.": "feed_forward.0.",
    "1.net.4.": "feed_forward.3.",
}


def ats_vit(module: Any) -> ATSViT:
    """The `ATSViT` with Gumbel sampling that has the weights of an upstream `ViT`.

    For the same seed it keeps the same tokens in the first block that samples, and in later ones where the tokens that
    arrive fill their capacity: upstream draws noise as wide as the batch's fullest image, narrows as wide as the
    capacity. Where upstream samples an image whose tokens all fit, because another image of the batch has more, narrows
    leaves it whole.

    Raises:
        InvalidArgument: the positions stand on no square grid of square patches.
    """
    height, width = module.patch_size
    num_patches = module.pos_embedding.shape[1] - 1
    if height != width or isqrt(num_patches) ** 2 != num_patches:
        raise InvalidArgument(
            "module", expected="square patches on a square grid", got=f"{num_patches} patches of {height} x {width}"
        )
    attention, feed_forward = module.transformer.layers[0]
    dim, inner = attention.to_out[0].weight.shape
    channels = module.to_patch_embedding[2].in_features // height**2
    converted = ATSViT(
        image_size=isqrt(num_patches) * height,
        patch_size=height,
        num_classes=module.mlp_head[1].out_features,
        channels=channels,
        stem="normed_patch",
        dim=dim,
        depth=len(module.transformer.layers),
        heads=attention.heads,
        head_dim=inner // attention.heads,
        mlp_dim=feed_forward.net[1].out_features,
        keep=_keep([layer.output_num_tokens for layer, _ in module.transformer.layers], num_patches),
        sampling="gumbel",
        qkv_bias=False,
        dropout=attention.dropout.p,
    )
    converted.embedding_dropout.p = module.dropout.p

    prefixes = _PREFIXES | {
        f"transformer.layers.{block}.{theirs}": f"blocks.{block}.{ours}"
        for block in range(len(converted.blocks))
        for theirs, ours in _BLOCK_PREFIXES.items()
    }
    state = {_renamed(name, prefixes): value for name, value in module.state_dict().items()}
    for name in ("patch_norm.weight", "patch_norm.bias", "linear.weight"):
        state[f"embedding.stem.{name}"] = _channels_first(state[f"embedding.stem.{name}"], channels, height)
    converted.load_state_dict(state)
    return converted


def _keep(max_tokens: Sequence[int], room: int) -> list[int | None]:
    """Upstream's blocks sample only where fewer tokens are asked for than can arrive."""
    keep: list[int | None] = []
    for count in max_tokens:
        keep.append(count if count < room else None)
        room = min(room, count)
    return keep


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    return next(ours + name.removeprefix(theirs) for theirs, ours in prefixes.items() if name.startswith(theirs))


def _channels_first(weight: Tensor, channels: int, patch_size: int) -> Tensor:
    """Upstream's patches are (row, column, channel)."""
    return weight.unflatten(-1, (patch_size, patch_size, channels)).movedim(-1, -3).flatten(-3)


CONVERTERS: Mapping[str, Callable[[Any], nn.Module]] = MappingProxyType({"vit_pytorch.ats_vit.ViT": ats_vit})
