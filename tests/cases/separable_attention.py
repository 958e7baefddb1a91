from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from narrows.layers.separable_attention import SeparableAttention, UpstreamSeparableAttention
from narrows.ops.separable_attention import IMPLEMENTATIONS
from tests.cases import LayerCase


def fill(layer: nn.Module) -> None:
    """Window tokens are zero at the start, and norms one and zero."""
    for name, parameter in layer.named_parameters():
        if name == "window_token" or "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)


def ours(**arguments: Any) -> Callable[..., nn.Module]:
    return partial(SeparableAttention, 16, heads=2, **arguments)


def upstream(**arguments: Any) -> Callable[..., nn.Module]:
    return partial(UpstreamSeparableAttention, 16, heads=2, head_dim=8, **arguments)


IMPLS = ("reference", *(name for name in IMPLEMENTATIONS if name != "reference"))

CASES = [
    LayerCase(
        "separable_attention",
        construct=ours(window_size=3),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        fill=fill,
        dynamic=False,
    ),
    LayerCase(
        "separable_attention_any_size",
        construct=ours(window_size=4),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        fill=fill,
        dynamic=False,
    ),
    LayerCase(
        "separable_attention_token_for_each_window",
        construct=ours(window_size=3, window_grid=(2, 3)),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
        fill=fill,
    ),
    LayerCase(
        "separable_attention_inside_windows",
        construct=ours(window_size=4, pointwise=False),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={"mask": "feature_map"},
        per_token=("feature_map",),
        pad_axis=2,
        impls=IMPLS,
        fill=fill,
        dynamic=False,
    ),
    LayerCase(
        "upstream_separable_attention",
        construct=upstream(window_size=3),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
        fill=fill,
    ),
    LayerCase(
        "upstream_separable_attention_in_windows",
        construct=upstream(window_size=2),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 3, 2, 4, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
        fill=fill,
    ),
    LayerCase(
        "upstream_separable_attention_one_window",
        construct=upstream(window_size=5, pointwise=False),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 5, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
        fill=fill,
    ),
]
