"""Feature maps of several scales out of a backbone, and a pyramid that joins them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType, MissingExtra
from narrows.layers.initialisation import reset_submodules
from narrows.validation import check_positive


class FeatureInfo:
    """Width and scale of feature maps, as timm's `feature_info` has them."""

    def __init__(self, maps: Sequence[dict[str, Any]]) -> None:
        self._maps = tuple(maps)

    def channels(self) -> list[int]:
        """Width of each map."""
        return [entry["num_chs"] for entry in self._maps]

    def reduction(self) -> list[int]:
        """How many pixels, in height and in width, one position of each map stands for."""
        return [entry["reduction"] for entry in self._maps]

    def module_name(self) -> list[str]:
        """Name of the submodule that makes each map."""
        return [entry["module"] for entry in self._maps]

    def __len__(self) -> int:
        """How many maps there are."""
        return len(self._maps)


class FeaturePyramid(nn.Module):
    """A backbone without its head: images `[B, C, H, W]` in, a list of feature maps `[B, D, h, w]` out.

    What `create_model(name, features_only=True)` returns. Maps are in the channels-last memory format.

    Args:
        model: a model with stages; those after the last that is asked for are dropped from it.
        out_indices: of the stages; negative ones count from the end, a number n means the last n, None all.

    Raises:
        InvalidArgument: an index that no stage has, or a model without stages.

    >>> from narrows import create_model
    >>> backbone = create_model("sepvit_lite", features_only=True, out_indices=(1, 2))
    >>> backbone.feature_info.channels(), backbone.feature_info.reduction()
    ([64, 128], [8, 16])
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise InvalidArgument(
                "features_only", expected="a model with stages, such as sepvit_tiny", got=type(model).__name__
            )
        backbone: Any = model
        info = backbone.feature_info
        self.out_indices = take_indices(len(info), out_indices)
        self.feature_info = FeatureInfo([info[index] for index in self.out_indices])
        backbone.prune_intermediate_layers(self.out_indices, prune_norm=True)  # no map passes the final norm
        self.model = model

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor of the model does."""
        reset_submodules(self)

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B H W"] | None = None
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """Feature maps, in the order of `out_indices`; zero where `mask` says that there is padding."""
        return self.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
            images, indices=self.out_indices, intermediates_only=True, mask=mask
        )


class PyramidNetwork(nn.Module):
    """A backbone's maps joined from coarse to fine, all of one width (Lin et al. 2017, arXiv 1612.03144).

    Detection models of torchvision take it as their backbone: it has `out_channels` and returns maps by name.

    Args:
        backbone: images to a list of maps, the finest first, with a `feature_info`: what
            `narrows.create_model(name, features_only=True)` returns, and timm's function of that name.
        dim: channels of every map that comes out.
        device, dtype: where and in what precision the pyramid's own parameters are made.

    Raises:
        InvalidType: a backbone without `feature_info`.
        MissingExtra: without torchvision.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
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
        self.fpn = FeaturePyramidNetwork(list(info.channels()), dim).to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter anew; those of the pyramid as torchvision does."""
        reset_submodules(self)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> OrderedDict[str, Tensor]:
        """Maps `[B, dim, h, w]` by the names "0", "1", ..., the finest first."""
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(self.backbone(images))))


def take_indices(stages: int, indices: int | Sequence[int] | None) -> list[int]:
    """Numbers of stages from the first on: a negative index counts from the end, an integer n means the last n."""
    if indices is None:
        return list(range(stages))
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or any(not -stages <= index < stages for index in wanted):
        raise InvalidArgument(
            "out_indices", expected=f"indices of {stages} stages, or how many of the last of them", got=indices
        )
    return [index % stages for index in wanted]
