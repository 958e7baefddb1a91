"""SepViT: a pyramid of separable attention, in the form that `vit-pytorch` published."""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, lcm
from operator import mul
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.upstream_separable_attention import UpstreamSeparableAttention
from narrows.models.base import ImageClassifier, check_images
from narrows.models.parts import FeedForward, initialise_linear
from narrows.models.sepvit.arguments import for_each_stage, whole_for_each_stage
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
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, channels=channels, patch_stride=patch_stride)
        if not dims:
            raise InvalidArgument("dims", expected="at least one stage", got=dims)
        stages = len(dims)
        dims = whole_for_each_stage("dims", dims, stages)
        depths = whole_for_each_stage("depths", depths, stages)
        heads = whole_for_each_stage("heads", heads, stages)
        head_dims = whole_for_each_stage("head_dim", head_dim, stages)
        mlp_ratios = for_each_stage("mlp_ratio", mlp_ratio, stages)
        strides = (patch_stride, *(2 for _ in dims[1:]))
        self.channels = channels
        self.windows = whole_for_each_stage("window_size", window_size, stages)
        self.reductions = tuple(accumulate(strides, mul))
        if image_size is not None:
            check_positive(image_size=image_size)
            self._check_size("image_size", image_size, image_size)
        self.stages = nn.ModuleList(
            Stage(
                incoming,
                dim,
                depth=depths[index],
                stride=strides[index],
                mlp_dim=round(dim * mlp_ratios[index]),
                norm=index < stages - 1,
                heads=heads[index],
                head_dim=head_dims[index],
                window_size=self.windows[index],
                pointwise=image_size is None or ceil(image_size / self.reductions[index]) > self.windows[index],
                dropout=dropout,
            )
            for index, (incoming, dim) in enumerate(zip((channels, *dims), dims, strict=False))
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
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
        """Window tokens are not decayed."""
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


class Stage(nn.Module):
    """Overlapping patch embedding, position encoding and blocks: `[B, H, W, C]` to `[B, H / stride, W / stride, dim]`.

    Args:
        channels: width of the incoming feature map.
        dim: width of the outgoing one.
        depth: number of blocks.
        stride: how many incoming tokens, each way, become one.
        mlp_dim: hidden width of the feed-forwards.
        norm: normalise the outgoing feature map.
        attention: what `UpstreamSeparableAttention` takes.
    """

    def __init__(
        self, channels: int, dim: int, *, depth: int, stride: int, mlp_dim: int, norm: bool, **attention: Any
    ) -> None:
        super().__init__()
        self.window_size: int = attention["window_size"]
        self.embedding = nn.Conv2d(channels, dim, 2 * stride - 1, stride, stride - 1)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.blocks = nn.Sequential(*(Block(dim, mlp_dim=mlp_dim, **attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, feature_map: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        """The feature map of the next scale."""
        embedded = self.embedding(feature_map.permute(0, 3, 1, 2))
        positioned = embedded + self.position(embedded)
        windows = to_windows(positioned.permute(0, 2, 3, 1), self.window_size)
        return from_windows(self.norm(self.blocks(windows)), self.window_size)


class Block(nn.Module):
    """Pre-norm transformer block on windows `[B, Y, X, n, D]`, with separable attention."""

    def __init__(self, dim: int, *, mlp_dim: int, dropout: float, **attention: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = UpstreamSeparableAttention(dim, dropout=dropout, **attention)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, mlp_dim, dropout=dropout)

    def forward(self, windows: Float[Tensor, "B Y X n D"]) -> Float[Tensor, "B Y X n D"]:
        """The tokens after attention and feed-forward."""
        windows = windows + self.attention(self.attention_norm(windows))
        return windows + self.feed_forward(self.feed_forward_norm(windows))
