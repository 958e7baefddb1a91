"""`vit_pytorch.sep_vit.SepViT`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged
from narrows.models import UpstreamSepViT


def sepvit(module: Any) -> Conversion:
    """The `UpstreamSepViT` of an upstream `SepViT`, exact at every image size that upstream takes.

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
    )
    modules = {"": "", "stages": "layers", "norm": "mlp_head.1", "head": "mlp_head.2"}
    conversion = Conversion(ours, UpstreamSepViTAsUpstream, modules, {}, {}, {}, {})
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
            conversion.parameters |= _norm(f"{here}.norm", f"{there}.2.norm")
        for number, (attention, _) in enumerate(stage[2].layers):
            _block(conversion, f"{here}.blocks.{number}", f"{there}.2.layers.{number}", attention, attentions[index])
    return conversion


def _block(conversion: Conversion, here: str, there: str, attention: Any, first: Any) -> None:
    """Add what becomes what in one block; its attention is built like the first of its stage."""
    attend, feed_forward = f"{there}.0", f"{there}.1.net"
    query_key = f"{attend}.window_tokens_to_qk"
    conversion.modules |= {
        here: there,
        f"{here}.attention": attend,
        f"{here}.attention_norm": f"{attend}.norm",
        f"{here}.attention.qkv": f"{attend}.to_qkv",
        f"{here}.attention.window_norm": f"{query_key}.0",
        f"{here}.attention.window_query_key": f"{query_key}.3",
        f"{here}.attention.out": f"{attend}.to_out.0",
        f"{here}.feed_forward_norm": f"{feed_forward}.0",
        f"{here}.feed_forward": feed_forward,
        **{f"{here}.feed_forward.{index}": f"{feed_forward}.{index + 1}" for index in range(5)},
    }
    in_order = partial(_query_then_key, heads=attention.heads)
    conversion.parameters |= {
        **_norm(f"{here}.attention_norm", f"{attend}.norm"),
        f"{here}.attention.window_token": f"{attend}.window_tokens",
        f"{here}.attention.qkv.weight": Rearranged((f"{attend}.to_qkv.weight",), partial(torch.flatten, start_dim=1)),
        f"{here}.attention.window_query_key.weight": Rearranged((f"{query_key}.3.weight",), in_order),
        f"{here}.attention.window_query_key.bias": Rearranged((f"{query_key}.3.bias",), in_order),
        **_pointwise(f"{here}.attention.out", f"{attend}.to_out.0"),
        **_norm(f"{here}.feed_forward_norm", f"{feed_forward}.0"),
        **_pointwise(f"{here}.feed_forward.0", f"{feed_forward}.1"),
        **_pointwise(f"{here}.feed_forward.3", f"{feed_forward}.4"),
    }
    conversion.without_module |= {
        f"{attend}.attend.0": nn.Softmax,
        f"{attend}.window_attend.0": nn.Softmax,
        f"{query_key}.1": nn.GELU,
    }
    conversion.dropouts |= {
        f"{here}.attention": (f"{attend}.attend.1", f"{attend}.window_attend.1", f"{attend}.to_out.1")
    }
    head_dim = first.window_tokens_to_qk[0].normalized_shape[0]
    conversion.settings |= {
        f"{attend}.heads": first.heads,
        f"{attend}.window_size": first.window_size,
        f"{attend}.scale": head_dim**-0.5,
    }


def _query_then_key(rows: Tensor, *, heads: int) -> Tensor:
    """From heads, (query, key), width of a head to (query, key), heads, width of a head."""
    return rows.flatten(1).unflatten(0, (heads, 2, -1)).transpose(0, 1).flatten(0, 2)


def _pointwise(ours: str, theirs: str) -> dict[str, Any]:
    """A convolution of 1 x 1 as a linear map."""
    return {
        f"{ours}.weight": Rearranged((f"{theirs}.weight",), partial(torch.flatten, start_dim=1)),
        f"{ours}.bias": f"{theirs}.bias",
    }


def _norm(ours: str, theirs: str) -> dict[str, Any]:
    return {
        f"{ours}.weight": Rearranged((f"{theirs}.g",), torch.flatten),
        f"{ours}.bias": Rearranged((f"{theirs}.b",), torch.flatten),
    }


class UpstreamSepViTAsUpstream(UpstreamSepViT):
    """`UpstreamSepViT` whose argument has upstream's name."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits `[B, classes]`."""
        return super().forward(x)


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {"vit_pytorch.sep_vit.SepViT": sepvit}
