"""SepViT in the form that `vit-pytorch` published, another network than the paper's."""

from collections.abc import Sequence
from math import ceil, lcm
from operator import mul
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.separable_attention import UpstreamSeparableAttention
from narrows.models.base import ImageClassifier, check_images
from narrows.models.blocks import Block, FeedForward, initialise_linear
from narrows.models.stages import StageShape, integer_for_each_stage, stage_shapes
from narrows.ops.separable_attention import from_windows, to_windows
from narrows.validation import check_positive


class UpstreamSepViT(ImageClassifier):
    """A classifier of stages of separable attention, each on half the grid of the one before (Li et al. 2022).

    Every stage embeds overlapping patches, adds a conditional position encoding, cuts the map into windows, and keeps
    them through all its blocks. Images of any size run whose grid the windows divide in every stage. There is one value
    for all stages, or one for each, of `heads`, `window_size` and `head_dim`.

    Args:
        image_size: side of the images the model is built for. A stage that is a single window at this size gets no
            attention between windows: there would be nothing to train it. None builds it everywhere.
        num_classes: width of the logits.
        channels: channels of the images.
        dims: token width of each stage.
        depths: number of blocks of each stage.
        heads: attention heads.
        window_size: side of a window, in tokens.
        head_dim: width of a head.
        patch_stride: pixels from one token of the first stage to the next; later stages have stride 2.
        mlp_ratio: hidden width of the feed-forwards, in token widths.
        dropout: in attention, its output and the feed-forwards.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: a list of the wrong length, or an image size that the windows do not divide; the message names
            the nearest size that they do.
    """

    def __init__(
        self,
        *,
        image_size: int | None = None,
        num_classes: int,
        channels: int = 3,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: int | Sequence[int],
        window_size: int | Sequence[int] = 7,
        head_dim: int | Sequence[int] = 32,
        patch_stride: int = 4,
        mlp_ratio: float | Sequence[float] = 4.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, channels=channels)
        shapes = stage_shapes(
            dims=dims, depths=depths, heads=heads, window_size=window_size, mlp_ratio=mlp_ratio,
            patch_stride=patch_stride,
        )  # fmt: skip
        head_dims = integer_for_each_stage("head_dim", head_dim, len(shapes))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = channels
        self.windows = integer_for_each_stage("window_size", window_size, len(shapes))
        self.reductions = tuple(shape.reduction for shape in shapes)
        if image_size is not None:
            check_positive(image_size=image_size)
            self._check_size("image_size", image_size, image_size)
        self.stages = nn.ModuleList(
            UpstreamStage(
                incoming,
                shape,
                norm=shape is not shapes[-1],
                head_dim=head_dim,
                pointwise=image_size is None or shape.window_grids((image_size, image_size))[0] != (1, 1),
                dropout=dropout,
                **factory,
            )
            for incoming, shape, head_dim in zip((channels, *dims), shapes, head_dims, strict=False)
        )
        self.norm = nn.LayerNorm(dims[-1], **factory)
        self.head = nn.Linear(dims[-1], num_classes, **factory)
        self.apply(initialise_linear)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, from the distribution that the constructor draws it from."""
        super().reset_parameters()
        self.apply(initialise_linear)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """The feature map of the last stage, channels last."""
        check_images(images, self.channels)
        self._check_size("images", *images.shape[-2:])
        feature_map = images.permute(0, 2, 3, 1).contiguous()
        for stage in self.stages:
            feature_map = stage(feature_map)
        return feature_map

    def forward_head(self, features: Float[Tensor, "B h w D"]) -> Float[Tensor, "B classes"]:
        """Logits from the mean of the feature map."""
        return self.head(self.norm(features.mean((1, 2))))

    def token_grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """`(height, width)` of the first stage's grid; the routing of a later stage stands on its own, smaller grid."""
        height, width = images.shape[-2:]
        return ceil(height / self.reductions[0]), ceil(width / self.reductions[0])

    def no_weight_decay(self) -> set[str]:
        """Names of the window tokens, which weight decay should leave alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("window_token")}

    def _divides(self, side: int) -> bool:
        stages = zip(self.reductions, self.windows, strict=True)
        return side > 0 and all(ceil(side / reduction) % window == 0 for reduction, window in stages)

    def _nearest(self, side: int) -> int:
        """`side` where windows divide it, else the nearest whole number of patches that they do."""
        if self._divides(side):
            return side
        patch, period = self.reductions[0], lcm(*map(mul, self.reductions, self.windows))
        usable = filter(self._divides, range(patch, side + period + 1, patch))
        return min(usable, key=lambda other: abs(other - side))

    def _check_size(self, name: str, height: int, width: int) -> None:
        if self._divides(height) and self._divides(width):
            return
        raise InvalidArgument(
            name,
            expected=f"a size whose grid windows of {self.windows} tokens divide at 1/{self.reductions} of it",
            got=f"{height} x {width}",
            hint=f"The nearest usable size is {self._nearest(height)} x {self._nearest(width)}.",
        )


class UpstreamStage(nn.Module):
    """Overlapping patch embedding, position encoding and blocks: `[B, H, W, C]` to `[B, H / stride, W / stride, dim]`.

    Args:
        channels: width of the incoming feature map.
        shape: its sizes.
        norm: normalise the outgoing feature map.
        head_dim, pointwise, dropout: see `UpstreamSeparableAttention`.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        channels: int,
        shape: StageShape,
        *,
        norm: bool,
        head_dim: int,
        pointwise: bool,
        dropout: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        dim, self.window_size = shape.dim, shape.window_sizes[0]

        def block() -> Block:
            attention = UpstreamSeparableAttention(
                dim,
                heads=shape.heads,
                head_dim=head_dim,
                window_size=self.window_size,
                pointwise=pointwise,
                dropout=dropout,
                **factory,
            )
            return Block(dim, attention, FeedForward(dim, shape.mlp_dim, dropout=dropout, **factory), **factory)

        self.embedding = nn.Conv2d(channels, dim, 2 * shape.stride - 1, shape.stride, shape.stride - 1, **factory)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.blocks = nn.Sequential(*(block() for _ in shape.window_sizes))
        self.norm = nn.LayerNorm(dim, **factory) if norm else nn.Identity()

    def forward(self, feature_map: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        """The feature map of the next scale."""
        embedded = self.embedding(feature_map.permute(0, 3, 1, 2))
        positioned = embedded + self.position(embedded)
        windows = to_windows(positioned.permute(0, 2, 3, 1), self.window_size)
        return from_windows(self.norm(self.blocks(windows)), self.window_size)


PRESETS: dict[str, dict[str, Any]] = {
    "sepvit_mini": {
        "image_size": 32, "num_classes": 10, "channels": 3, "patch_stride": 2, "window_size": 4,
        "dims": (32, 64, 128), "depths": (1, 1, 1), "heads": (1, 2, 4), "mlp_ratio": 2.0,
    },
    "sepvit_upstream_lite": {
        "image_size": 224, "num_classes": 1000, "channels": 3,
        "dims": (32, 64, 128, 256), "depths": (1, 2, 6, 2), "heads": (1, 2, 4, 8),
    },
}  # fmt: skip
