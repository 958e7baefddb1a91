"""`vit_pytorch.sep_vit.SepViT`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged
from narrows.models import UpstreamSepViT


def sepvit(module: Any) -> Conversion:
    """Upstream's `SepViT` as `UpstreamSepViT`, exact at every image size that upstream takes.

    Widths, windows and heads are those that upstream built, not those it was asked for: it ignores its arguments
    `window_size` and `dim_head`. Attention between windows is kept in the last stage too. Upstream leaves it without
    gradients as long as that stage is one window and uses it once images are larger.
    """
    embeddings = [stage[0].conv for stage in module.layers]
    blocks = [stage[2].layers[0] for stage in module.layers]
    attentions, hidden = [attention for attention, _ in blocks], [feed_forward.net[1] for _, feed_forward in blocks]
    ours = UpstreamSepViT(
        num_classes=module.mlp_head[2].out_features,
        channels=embeddings[0].in_channels,
        dims=[embedding.out_channels for embedding in embeddings],
        depths=[len(stage[2].layers) for stage in module.layers],
        heads=[attention.heads for attention in attentions],
        window_size=[attention.window_size for attention in attentions],
        head_dim=[attention.window_tokens_to_qk[0].normalized_shape[0] for attention in attentions],
        patch_stride=embeddings[0].stride[0],
        mlp_ratio=[layer.out_channels / layer.in_channels for layer in hidden],
        dropout=attentions[0].attend[1].p,
    )
    modules = {"": "", "stages": "layers", "norm": "mlp_head.1", "head": "mlp_head.2"}
    parameters: dict[str, str | Rearranged] = {}
    dropouts: dict[str, tuple[str, ...]] = {}
    without_module: dict[str, type[nn.Module]] = {}
    settings: dict[str, float] = {}
    for index, stage in enumerate(module.layers):
        here, there = f"stages.{index}", f"layers.{index}"
        modules |= {
            here: there,
            f"{here}.embedding": f"{there}.0.conv",
            f"{here}.position": f"{there}.1.proj",
            f"{here}.blocks": f"{there}.2.layers",
            f"{here}.norm": f"{there}.2.norm",
        }
        if not isinstance(stage[2].norm, nn.Identity):
            parameters |= _norm(f"{here}.norm", f"{there}.2.norm")
        first = attentions[index]
        for number in range(len(stage[2].layers)):
            block, attention = f"{here}.blocks.{number}", f"{there}.2.layers.{number}.0"
            modules |= _modules(block, attention, f"{there}.2.layers.{number}.1.net")
            parameters |= _parameters(block, attention, f"{there}.2.layers.{number}.1.net", heads=first.heads)
            dropouts[f"{block}.attention"] = tuple(f"{attention}.{name}" for name in _DROPOUTS)
            without_module |= {f"{attention}.{name}": kind for name, kind in _WITHOUT_MODULE.items()}
            head_dim = first.window_tokens_to_qk[0].normalized_shape[0]
            of_its_stage = {"heads": first.heads, "window_size": first.window_size, "scale": head_dim**-0.5}
            settings |= {f"{attention}.{name}": value for name, value in of_its_stage.items()}
    return Conversion(ours, UpstreamSepViTAsUpstream, modules, parameters, without_module, dropouts, settings)


_DROPOUTS = ("attend.1", "window_attend.1", "to_out.1")
_WITHOUT_MODULE = {"attend.0": nn.Softmax, "window_attend.0": nn.Softmax, "window_tokens_to_qk.1": nn.GELU}


def _modules(block: str, attention: str, feed_forward: str) -> dict[str, str]:
    """The submodules of a block of ours, from the names of upstream's two parts of one."""
    return {
        block: attention.rpartition(".")[0],
        f"{block}.attention_norm": f"{attention}.norm",
        f"{block}.attention": attention,
        f"{block}.attention.qkv": f"{attention}.to_qkv",
        f"{block}.attention.window_norm": f"{attention}.window_tokens_to_qk.0",
        f"{block}.attention.window_query_key": f"{attention}.window_tokens_to_qk.3",
        f"{block}.attention.out": f"{attention}.to_out.0",
        f"{block}.feed_forward_norm": f"{feed_forward}.0",
        f"{block}.feed_forward": feed_forward,
        **{f"{block}.feed_forward.{index}": f"{feed_forward}.{index + 1}" for index in range(5)},
    }


def _parameters(block: str, attention: str, feed_forward: str, *, heads: int) -> dict[str, str | Rearranged]:
    """Its parameters: convolutions of 1 x 1 become linear maps."""
    query_key = f"{attention}.window_tokens_to_qk.3"
    in_order = partial(_query_then_key, heads=heads)
    return {
        f"{block}.attention.window_token": f"{attention}.window_tokens",
        f"{block}.attention.qkv.weight": Rearranged((f"{attention}.to_qkv.weight",), _matrix),
        f"{block}.attention.window_query_key.weight": Rearranged((f"{query_key}.weight",), in_order),
        f"{block}.attention.window_query_key.bias": Rearranged((f"{query_key}.bias",), in_order),
        **_pointwise(f"{block}.attention.out", f"{attention}.to_out.0"),
        **_pointwise(f"{block}.feed_forward.0", f"{feed_forward}.1"),
        **_pointwise(f"{block}.feed_forward.3", f"{feed_forward}.4"),
        **_norm(f"{block}.attention_norm", f"{attention}.norm"),
        **_norm(f"{block}.feed_forward_norm", f"{feed_forward}.0"),
    }


def _matrix(weight: Tensor) -> Tensor:
    """Weight of a convolution of 1 or 1 x 1."""
    return weight.flatten(1)


def _query_then_key(rows: Tensor, *, heads: int) -> Tensor:
    """From heads, (query, key), width of a head to (query, key), heads, width of a head."""
    in_order = rows.unflatten(0, (heads, 2, -1)).transpose(0, 1).flatten(0, 2)
    return in_order if rows.ndim == 1 else in_order.flatten(1)


def _pointwise(ours: str, theirs: str) -> dict[str, str | Rearranged]:
    return {f"{ours}.weight": Rearranged((f"{theirs}.weight",), _matrix), f"{ours}.bias": f"{theirs}.bias"}


def _norm(ours: str, theirs: str) -> dict[str, str | Rearranged]:
    return {f"{ours}.{our}": Rearranged((f"{theirs}.{their}",), torch.flatten) for our, their in _NORM.items()}


_NORM = {"weight": "g", "bias": "b"}


class UpstreamSepViTAsUpstream(UpstreamSepViT):
    """`UpstreamSepViT` whose argument has upstream's name."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits `[B, classes]`."""
        return super().forward(x)


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {"vit_pytorch.sep_vit.SepViT": sepvit}
