"""Semantic segmentation on a backbone's feature maps."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.models.base import SavedModel
from narrows.models.features import PyramidNetwork
from narrows.models.registry import create_model
from narrows.validation import check_positive


class Segmenter(SavedModel, pipeline_tag="image-segmentation"):
    """Logits for every pixel: the levels of a feature pyramid, brought to the finest and added, and a small head.

    This is the semantic half of Kirillov et al. 2019 (arXiv 1901.02446). The head's last step answers for all pixels of
    a cell of the finest map at once (sub-pixel convolution, Shi et al. 2016, arXiv 1609.05158), so that edges are as
    sharp as the image.

    Args:
        backbone: a registry name with feature maps, or a module that `PyramidNetwork` takes.
        num_classes: width of the logits.
        channels: channels of the images.
        dim: width of the pyramid and of the head.
        backbone_args: further arguments of the backbone, over those of its registry name.
        device, dtype: where and in what precision parameters are made; a backbone that is a module stays as it is.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "sepvit_lite",
        *,
        num_classes: int,
        channels: int = 3,
        dim: int = 128,
        backbone_args: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, channels=channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(backbone, str):
            arguments = {"channels": channels, **factory, **(backbone_args or {})}
            backbone = create_model(backbone, features_only=True, **arguments)
        self.pyramid = PyramidNetwork(backbone, dim, **factory)
        self.cell = self.pyramid.reductions[0]
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False, **factory),
            nn.GroupNorm(1, dim, **factory),
            nn.GELU(),
            nn.Conv2d(dim, num_classes * self.cell**2, 1, **factory),
            nn.PixelShuffle(self.cell),
        )

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes H W"]:
        """Logits `[B, num_classes, H, W]`."""
        finest, *coarser = self.pyramid(images).values()
        size = finest.shape[-2:]
        joined = finest
        for level in coarser:
            joined = joined + F.interpolate(level, size, mode="bilinear", align_corners=False)
        return self.head(joined)[..., : images.shape[-2], : images.shape[-1]]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone exempts from weight decay."""
        parts: list[tuple[str, Any]] = [(name, part) for name, part in self.named_modules() if part is not self]
        naming = [(name, part) for name, part in parts if hasattr(part, "no_weight_decay")]
        return {f"{name}.{parameter}" for name, part in naming for parameter in part.no_weight_decay()}
