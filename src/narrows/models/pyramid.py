"""Feature pyramids for dense prediction."""

from collections import OrderedDict
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidType, MissingExtra
from narrows.validation import check_positive


class PyramidNetwork(nn.Module):
    """A backbone's maps joined from coarse to fine, all of one width (Lin et al. 2017, arXiv 1612.03144).

    Detection models of torchvision take it as their backbone: it has `out_channels` and returns maps by name.

    Args:
        backbone: images to a list of maps, the finest first, with a `feature_info`: what
            `narrows.create_model(name, features_only=True)` returns, and timm's function of that name.
        dim: channels of every map that comes out.

    Raises:
        InvalidType: a backbone without `feature_info`.
        MissingExtra: without torchvision.
    """

    def __init__(self, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        try:
            from torchvision.ops import FeaturePyramidNetwork
        except ImportError as error:
            raise MissingExtra("torchvision", extra="train", purpose="build a feature pyramid") from error
        check_positive(dim=dim)
        info: Any = getattr(backbone, "feature_info", None)
        if not hasattr(info, "channels"):
            raise InvalidType(
                "backbone",
                expected="a module that returns feature maps and describes them in `feature_info`",
                got=type(backbone).__name__,
                hint="Build it with features_only=True.",
            )
        self.backbone = backbone
        self.reductions: list[int] = list(info.reduction())
        self.out_channels = dim
        self.fpn = FeaturePyramidNetwork(list(info.channels()), dim)

    def forward(self, images: Float[Tensor, "B C H W"]) -> OrderedDict[str, Tensor]:
        """Maps `[B, dim, h, w]` by the names "0", "1", ..., the finest first."""
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(self.backbone(images))))
