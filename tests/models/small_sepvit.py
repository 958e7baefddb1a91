"""A small SepViT with everything that the large ones have: both window sizes, one window and several."""

from typing import Any

import torch
from torch import Tensor, nn

from narrows.models import SepViT

SMALL: dict[str, Any] = {
    "image_size": 32, "num_classes": 5, "patch_stride": 2, "dims": (8, 16), "depths": (2, 3), "heads": (2, 4),
    "window_size": ((2, 4), (2, 4)),
}  # fmt: skip


def small(**kwargs: Any) -> SepViT:
    """Windows of 2 and 4 on grids of 16 x 16 and 8 x 8 at 32 pixels."""
    return SepViT(**{**SMALL, **kwargs}).eval()


def random_small(**kwargs: Any) -> SepViT:
    """The same in float64, its parameters far from where they start, where window tokens are zero."""
    model = small(**kwargs).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model


def images(*size: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))
