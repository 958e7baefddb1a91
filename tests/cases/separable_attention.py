from typing import Any

import torch
from torch import nn

from narrows.layers.separable_attention import SeparableAttention
from narrows.layers.upstream_separable_attention import UpstreamSeparableAttention
from narrows.ops.separable_attention import IMPLEMENTATIONS
from tests.cases import LayerCase


def fill(layer: nn.Module) -> nn.Module:
    """Window tokens are zero at the start, and norms one and zero."""
    for name, parameter in layer.named_parameters():
        if name == "window_token" or "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return layer


def build(impl: str = "auto", **kwargs: Any) -> nn.Module:
    return fill(SeparableAttention(16, heads=2, impl=impl, **kwargs))


def build_upstream(impl: str = "auto", *, window_size: int, pointwise: bool = True) -> nn.Module:
    layer = UpstreamSeparableAttention(16, heads=2, head_dim=8, window_size=window_size, pointwise=pointwise, impl=impl)
    nn.init.normal_(layer.window_token)
    return fill(layer)


IMPLS = ("reference", *(name for name in IMPLEMENTATIONS if name != "reference"))

CASES = [
    LayerCase(
        "separable_attention",
        build=lambda impl="auto": build(impl, window_size=3),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        dynamic=False,
    ),
    LayerCase(
        "separable_attention_any_size",
        build=lambda impl="auto": build(impl, window_size=4),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        dynamic=False,
    ),
    LayerCase(
        "separable_attention_token_for_each_window",
        build=lambda impl="auto": build(impl, window_size=3, window_grid=(2, 3)),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
    LayerCase(
        "separable_attention_inside_windows",
        build=lambda impl="auto": build(impl, window_size=4, pointwise=False),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        dynamic=False,
    ),
    LayerCase(
        "upstream_separable_attention",
        build=lambda impl="auto": build_upstream(impl, window_size=3),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
    LayerCase(
        "upstream_separable_attention_in_windows",
        build=lambda impl="auto": build_upstream(impl, window_size=2),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 3, 2, 4, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
    LayerCase(
        "upstream_separable_attention_one_window",
        build=lambda impl="auto": build_upstream(impl, window_size=5, pointwise=False),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 5, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
]
