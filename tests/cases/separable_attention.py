import torch
from torch import nn

from narrows.layers.separable_attention import SeparableAttention
from narrows.ops.separable_attention import IMPLEMENTATIONS
from tests.cases import LayerCase


def build(impl: str = "auto", *, window_size: int, pointwise: bool = True) -> nn.Module:
    layer = SeparableAttention(16, heads=2, head_dim=8, window_size=window_size, pointwise=pointwise, impl=impl)
    nn.init.normal_(layer.window_token)
    if layer.window_norm is not None:
        nn.init.normal_(layer.window_norm.weight, mean=1.0)
        nn.init.normal_(layer.window_norm.bias)
    return layer


IMPLS = ("reference", *(name for name in IMPLEMENTATIONS if name != "reference"))

CASES = [
    LayerCase(
        "separable_attention",
        build=lambda impl="auto": build(impl, window_size=3),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 6, 9, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
    LayerCase(
        "separable_attention_in_windows",
        build=lambda impl="auto": build(impl, window_size=2),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 3, 2, 4, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
    LayerCase(
        "separable_attention_one_window",
        build=lambda impl="auto": build(impl, window_size=5, pointwise=False),
        inputs=lambda batch: {"feature_map": torch.randn(batch, 5, 5, 16)},
        outputs=lambda result: {"feature_map": result},
        padded={},
        impls=IMPLS,
    ),
]
