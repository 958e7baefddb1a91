"""`vit_pytorch.ats_vit.ViT`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged
from narrows.errors import InvalidArgument
from narrows.models import ATSViT


def ats_vit(module: Any) -> Conversion:
    """Upstream's `ViT` as `ATSViT` with Gumbel sampling.

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
    head_dim = inner // attention.heads
    channels = module.to_patch_embedding[2].in_features // height**2
    blocks = range(len(module.transformer.layers))
    ours = ATSViT(
        image_size=isqrt(num_patches) * height,
        patch_size=height,
        num_classes=module.mlp_head[1].out_features,
        channels=channels,
        stem="normed_patch",
        dim=dim,
        depth=len(blocks),
        heads=attention.heads,
        head_dim=head_dim,
        mlp_dim=feed_forward.net[1].out_features,
        keep=_keep([layer.output_num_tokens for layer, _ in module.transformer.layers], num_patches),
        sampling="gumbel",
        qkv_bias=False,
        dropout=attention.dropout.p,
    )
    stem = "embedding.stem"
    channels_first = partial(_channels_first, channels=channels, patch_size=height)
    modules = {
        "": "",
        "embedding": "to_patch_embedding",
        **{f"{stem}.{name}": f"to_patch_embedding.{place}" for name, place in _STEM.items()},
        "embedding_dropout": "dropout",
        "blocks": "transformer.layers",
        "norm": "mlp_head.0",
        "head": "mlp_head.1",
    }
    for index in blocks:
        here, there = f"blocks.{index}", f"transformer.layers.{index}"
        modules |= {here: there, **{f"{here}.{name}": f"{there}.{place}" for name, place in _BLOCK.items()}}
    layers = [f"transformer.layers.{index}.0" for index in blocks]
    return Conversion(
        ours,
        ATSViTAsUpstream,
        modules,
        {
            "embedding.class_token": "cls_token",
            "embedding.positions": "pos_embedding",
            **{
                f"{stem}.{name}": Rearranged((f"to_patch_embedding.{place}",), channels_first)
                for name, place in {
                    "patch_norm.weight": "1.weight",
                    "patch_norm.bias": "1.bias",
                    "linear.weight": "2.weight",
                }.items()
            },
        },
        without_module={f"{layer}.attend": nn.Softmax for layer in layers},
        dropouts={
            f"blocks.{index}.attention": (f"{layer}.dropout", f"{layer}.to_out.1")
            for index, layer in zip(blocks, layers, strict=True)
        },
        settings={
            f"{layer}.{name}": value
            for layer in layers
            for name, value in {"heads": attention.heads, "scale": head_dim**-0.5}.items()
        },
    )


_STEM = {"patch_norm": 1, "linear": 2, "token_norm": 3}
_BLOCK = {
    "attention_norm": "0.norm",
    "attention": "0",
    "attention.qkv": "0.to_qkv",
    "attention.out": "0.to_out.0",
    "feed_forward_norm": "1.net.0",
    "feed_forward": "1.net",
    **{f"feed_forward.{index}": f"1.net.{index + 1}" for index in range(5)},
}


def _keep(max_tokens: Sequence[int], room: int) -> list[int | None]:
    """Upstream's blocks sample only where fewer tokens are asked for than can arrive."""
    keep: list[int | None] = []
    for count in max_tokens:
        keep.append(count if count < room else None)
        room = min(room, count)
    return keep


def _channels_first(weight: Tensor, *, channels: int, patch_size: int) -> Tensor:
    """Upstream's patches are (row, column, channel)."""
    return weight.unflatten(-1, (patch_size, patch_size, channels)).movedim(-1, -3).flatten(-3)


class ATSViTAsUpstream(ATSViT):
    """`ATSViT` that can answer with the positions of the tokens it kept, as upstream's does."""

    def forward(self, img: Tensor, return_sampled_token_ids: bool = False) -> Any:  # pyright: ignore
        """Logits `[B, classes]`; with them, if asked, the patches kept, `[B, K]` from 0, -1 where there are fewer."""
        if not return_sampled_token_ids:
            return super().forward(img)
        tokens, ids, mask = self.forward_tokens(img)
        kept = ids.masked_fill(~mask, 0)[:, 1:] - 1
        return self.forward_head(tokens[:, 0]), kept[:, : int(mask.sum(1).max()) - 1]


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {"vit_pytorch.ats_vit.ViT": ats_vit}
