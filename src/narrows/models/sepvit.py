"""SepViT, the network of the paper: stochastic depth, blocks, stages, and the pyramid of them."""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import draw_
from narrows.layers.separable_attention import NORM_EPS, SeparableAttention
from narrows.models.base import ImageClassifier, check_images
from narrows.models.blocks import FeedForward
from narrows.models.features import take_indices
from narrows.models.stages import StageShape, stage_shapes
from narrows.ops.separable_attention import WindowOrder
from narrows.validation import check_choice, check_mask, check_positive, checked

POOLS = ("avg", "max", "")


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is 0 with probability `rate` (Huang et al. 2016, 1603.09382).

    The branches that are kept are divided by 1 - `rate`, so that the expectation stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Float[Tensor, "B *layout"]) -> Float[Tensor, "B *layout"]:
        """The branch, 0 for some samples."""
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_full((branch.shape[0], *(1 for _ in branch.shape[1:])), 1 - self.rate).bernoulli()
        return branch * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rate={self.rate:.3g}"


class SepViTBlock(nn.Module):
    """Separable attention and feed-forward, each with a residual, on tokens `[B, N, D]` in the order of their windows.

    Args:
        dim: token width.
        heads, window_size, window_grid, pointwise: see `SeparableAttention`.
        mlp_dim: hidden width of the feed-forward.
        drop_path: probability with which a sample skips the attention, and the feed-forward.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window_size: int,
        window_grid: tuple[int, int],
        pointwise: bool,
        mlp_dim: int,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.attention = SeparableAttention(
            dim, heads=heads, window_size=window_size, window_grid=window_grid, pointwise=pointwise, **factory
        )
        self.feed_forward_norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.feed_forward = FeedForward(dim, mlp_dim, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None, order: WindowOrder
    ) -> Float[Tensor, "B N D"]:
        """The tokens after attention and feed-forward."""
        tokens = tokens + self.drop_path(self.attention(tokens, mask, order))
        return tokens + self.drop_path(self.feed_forward(self.feed_forward_norm(tokens)))


class SepViTStage(nn.Module):
    """Overlapping patch embedding, then blocks with a conditional position encoding after the first.

    `[B, H, W, C]` becomes `[B, H / stride, W / stride, dim]`, rounded up. The blocks keep their tokens in an order in
    which windows are views; only the convolutions need them in raster order.

    Args:
        channels: width of the incoming feature map.
        shape: its sizes.
        window_grids: for each block, the grid of windows it is trained on: a single one gets no attention between
            windows. None where that is not known.
        per_window: whether each window of that grid has a window token of its own.
        drop_path: for each block, the probability that a sample skips its branches.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        channels: int,
        shape: StageShape,
        *,
        window_grids: Sequence[tuple[int, int]] | None,
        per_window: bool,
        drop_path: Sequence[float],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.window_sizes = tuple(sorted(set(shape.window_sizes)))
        self.grad_checkpointing = False
        self.embedding = nn.Conv2d(channels, shape.dim, 2 * shape.stride - 1, shape.stride, shape.stride - 1, **factory)
        self.embedding_norm = nn.LayerNorm(shape.dim, eps=NORM_EPS, **factory)
        self.position = nn.Conv2d(shape.dim, shape.dim, 3, padding=1, groups=shape.dim, **factory)
        self.blocks = nn.ModuleList(
            SepViTBlock(
                shape.dim,
                heads=shape.heads,
                mlp_dim=shape.mlp_dim,
                window_size=size,
                window_grid=window_grids[index] if window_grids and per_window else (1, 1),
                pointwise=window_grids is None or window_grids[index] != (1, 1),
                drop_path=drop_path[index],
                **factory,
            )
            for index, size in enumerate(shape.window_sizes)
        )

    def forward(
        self, feature_map: Float[Tensor, "B H W C"], mask: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B h w D"]:
        """The feature map of the next scale.

        Args:
            feature_map: zero where there is padding, as convolutions find it beyond the border of an image.
            mask: True at real tokens of what comes out, which is zero at the others; None where all are.
        """
        embedded = self.embedding_norm(self._convolve(self.embedding, feature_map))
        order = WindowOrder(embedded.shape[1], embedded.shape[2], self.window_sizes)
        token_mask = None if mask is None else order.arrange(mask.unsqueeze(-1)).squeeze(-1)
        tokens = order.arrange(embedded)
        for index, block in enumerate(self.blocks):
            tokens = self._run(block, tokens, token_mask, order)
            if index == 0:
                raster = order.restore(without_padding(tokens, token_mask))
                position = self._convolve(self.position, raster)
                if len(self.blocks) == 1:
                    return without_padding(raster + position, mask)
                tokens = order.add(tokens, position)
        return order.restore(without_padding(tokens, token_mask))

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.grad_checkpointing and self.training and not torch.compiler.is_exporting():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    @staticmethod
    def _convolve(convolution: nn.Module, feature_map: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return convolution(feature_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SepViT(ImageClassifier):
    """A pyramid of separable attention: classifier and backbone (Li et al. 2022, arXiv 2203.15380).

    Every stage embeds overlapping patches and normalises them, then runs blocks of separable attention on windows, with
    a conditional position encoding after the first. A stage whose `window_size` names several sizes gives them to its
    blocks in turn: larger windows are the paper's grouped self-attention. Images may have any size from one window of
    the first stage on; where windows do not divide the grid of a stage, padding completes them and takes part in
    nothing. There is one value for all stages, or one for each, of `heads`, `window_size` and `mlp_ratio`.

    Args:
        image_size: side of the images, or (height, width), that the network is trained on. Blocks with a single window
            there get no attention between windows: nothing would train it, and larger images must not meet it
            untrained. None builds it everywhere.
        num_classes: width of the logits; 0 for pooled features in their place.
        channels: channels of the images.
        dims: token width of each stage.
        depths: number of blocks of each stage.
        heads: attention heads, a divisor of `dims`.
        window_size: side of the windows, in tokens, for instance `(7, (7, 14), (7, 14), 7)`.
        patch_stride: pixels from one token of the first stage to the next; later stages have stride 2.
        mlp_ratio: hidden width of the feed-forwards, in token widths.
        window_tokens: "shared" by all windows of a block, for any size; or "per_window", one for each window at
            `image_size`, interpolated at other sizes.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        drop_rate: dropout before the head.
        global_pool: "avg", "max", or "" for logits of every token.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: a list of the wrong length, heads that do not divide their width, window sizes of a stage of
            which one does not divide the next.
    """

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] | None = 224,
        num_classes: int = 1000,
        channels: int = 3,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: int | Sequence[int],
        window_size: int | Sequence[int | Sequence[int]] = 7,
        patch_stride: int = 4,
        mlp_ratio: float | Sequence[float] = 4.0,
        window_tokens: str = "shared",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        check_choice("window_tokens", window_tokens, ("shared", "per_window"))
        for name, rate in {"drop_path_rate": drop_path_rate, "drop_rate": drop_rate}.items():
            if not 0 <= rate < 1:
                raise InvalidArgument(name, expected="a share in [0, 1)", got=rate)
        shapes = stage_shapes(
            dims=dims, depths=depths, heads=heads, window_size=window_size, mlp_ratio=mlp_ratio,
            patch_stride=patch_stride,
        )  # fmt: skip
        for shape in shapes:
            if shape.dim % shape.heads:
                raise InvalidArgument("heads", expected=f"divisors of dims = {tuple(dims)}", got=heads)
        per_window, trained_on = window_tokens == "per_window", _height_and_width(image_size)
        if per_window and trained_on is None:
            raise InvalidArgument("image_size", expected="the size that has these per-window tokens", got=None)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.patch_stride, self.per_window = channels, patch_stride, per_window
        self.smallest = patch_stride * (min(shapes[0].window_sizes) - 1) + 1
        self.reduction, self.num_features = shapes[-1].reduction, shapes[-1].dim
        # What timm calls the width of what the head reads, the layout of `forward_features`, and the maps there are.
        self.head_hidden_size, self.output_fmt = self.num_features, "NHWC"
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": shape.dim, "reduction": shape.reduction, "module": f"stages.{index}"}
            for index, shape in enumerate(shapes)
        ]
        blocks = sum(len(shape.window_sizes) for shape in shapes)
        rates = iter(drop_path_rate * block / max(1, blocks - 1) for block in range(blocks))
        self.stages = nn.ModuleList(
            SepViTStage(
                incoming,
                shape,
                window_grids=None if trained_on is None else shape.window_grids(trained_on),
                per_window=per_window,
                drop_path=[next(rates) for _ in shape.window_sizes],
                **factory,
            )
            for incoming, shape in zip((channels, *(shape.dim for shape in shapes)), shapes, strict=False)
        )
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=NORM_EPS, **factory)
        self.dropout = nn.Dropout(drop_rate)
        self.global_pool, self.num_classes = global_pool, num_classes
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(initialise)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, from the distribution that the constructor draws it from."""
        super().reset_parameters()
        self.apply(initialise)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B H W"] | None = None) -> Tensor:
        """Logits `[B, num_classes]`; pooled features `[B, D]` where there are no classes.

        Args:
            images: of any size from one window of the first stage on.
            mask: True at the pixels that belong to an image, for images of different sizes in one batch: each stands
                in the upper left corner and gets what it gets alone. None where all do.
        """
        return self.forward_head(self.forward_features(images, mask), mask)

    def forward_features(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B h w D"]:
        """The normalised feature map of the last stage, channels last; zero where there is padding."""
        return self._normed(self._maps(images, mask, len(self.stages))[-1], mask)

    def forward_head(
        self,
        features: Float[Tensor, "B h w D"],
        mask: Bool[Tensor, "B H W"] | None = None,
        pre_logits: bool = False,
    ) -> Tensor:
        """Logits from what `forward_features` returns for the same `mask`; with `pre_logits` what the head reads."""
        pooled = self.dropout(pool(features, tokens_of(mask, self.reduction), self.global_pool))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        mask: Bool[Tensor, "B H W"] | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of stages, by the rules of timm: a list, or what `forward_features` returns and the list.

        Args:
            images: `[B, C, H, W]`.
            indices: of the stages; negative ones count from the end, a number n means the last n, None all.
            norm: put the last stage's map through the final norm.
            stop_early: do not run the stages after the last that is asked for.
            output_fmt: "NCHW" (views in the channels-last memory format) or "NHWC".
            intermediates_only: return the list alone.
            mask: see `forward`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        taken = take_indices(len(self.stages), indices)
        run = max(taken) + 1 if stop_early or intermediates_only else len(self.stages)
        maps = self._maps(images, mask, run)
        final = self._normed(maps[-1], mask) if run == len(self.stages) else maps[-1]
        chosen = [final if norm and index == len(self.stages) - 1 else maps[index] for index in taken]
        if output_fmt == "NCHW":
            chosen = [feature_map.permute(0, 3, 1, 2) for feature_map in chosen]
        return chosen if intermediates_only else (final, chosen)

    def token_grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """`(height, width)` of the first stage's grid; the routing of a later stage stands on its own, smaller grid."""
        height, width = images.shape[-2:]
        return ceil(height / self.patch_stride), ceil(width / self.patch_stride)

    def no_weight_decay(self) -> set[str]:
        """Names of the window tokens, which weight decay should leave alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("window_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, as patterns: what timm's layer-wise learning rates ask for."""
        blocks = r"^stages\.(\d+)"
        fine = [(rf"{blocks}\.(?:embedding|position)", (0,)), (rf"{blocks}\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.embedding", "blocks": blocks if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: the backward pass computes each block again instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head for that many classes; 0 leaves pooled features.

        Args:
            num_classes: width of the logits.
            global_pool: "avg", "max" or ""; None leaves it as it is.
        """
        if num_classes != 0:
            check_positive(num_classes=num_classes)
        pooling = self.global_pool if global_pool is None else global_pool
        check_choice("global_pool", pooling, POOLS)
        self.num_classes, self.global_pool = num_classes, pooling
        self._hub_mixin_config.update(num_classes=num_classes, global_pool=pooling)  # pyright: ignore
        self.head = nn.Identity()
        if num_classes:
            like = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            initialise(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop stages, final norm and head as far as the feature maps of these stages do not need them.

        Returns:
            The stages meant, counted from the first.
        """
        taken = take_indices(len(self.stages), indices)
        shortened = max(taken) < len(self.stages) - 1
        self.stages = self.stages[: max(taken) + 1]  # pyright: ignore[reportAttributeAccessIssue]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        last = self.feature_info[max(taken)]
        self.num_features, self.reduction = last["num_chs"], last["reduction"]
        self.head_hidden_size = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    def _maps(self, images: Tensor, mask: Tensor | None, stages: int) -> list[Float[Tensor, "B h w D"]]:
        """The feature maps of the first so many stages, channels last."""
        self._check(images, mask)
        maps = [without_padding(images.permute(0, 2, 3, 1).contiguous(), mask)]
        for stage, info in zip(self.stages[:stages], self.feature_info, strict=False):  # pyright: ignore
            maps.append(stage(maps[-1], tokens_of(mask, info["reduction"])))
        return maps[1:]

    def _normed(self, last: Float[Tensor, "B h w D"], mask: Tensor | None) -> Float[Tensor, "B h w D"]:
        return without_padding(self.norm(last), tokens_of(mask, self.reduction))

    def _check(self, images: Tensor, mask: Tensor | None) -> None:
        check_images(images, self.channels)
        check_mask("mask", mask, (images.shape[0], *images.shape[-2:]), layout="[B, H, W]")
        if min(images.shape[-2:]) < self.smallest:
            raise InvalidArgument(
                "images",
                expected=f"sides of at least {self.smallest} pixels, one window of the first stage",
                got=f"{images.shape[-2]} x {images.shape[-1]}",
                hint="Pad or enlarge them.",
            )
        if mask is not None and self.per_window:
            raise InvalidArgument(
                "mask",
                expected='none where window_tokens is "per_window", which belong to places of one size',
                got="a mask",
                hint='Use window_tokens="shared".',
            )


def initialise(module: nn.Module) -> None:
    """The paper's initialisation: truncated normal of 0.02, convolutions by their fan-out, biases zero."""
    if isinstance(module, nn.Linear):
        draw_(module.weight, partial(nn.init.trunc_normal_, std=0.02))
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def without_padding(
    tokens: Float[Tensor, "B *layout D"], mask: Bool[Tensor, "B *layout"] | None
) -> Float[Tensor, "B *layout D"]:
    """The tokens, zero where `mask` is False."""
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0)


def tokens_of(mask: Bool[Tensor, "B H W"] | None, reduction: int) -> Bool[Tensor, "B h w"] | None:
    """Which tokens of a grid are real: those whose convolutions are centred on a real pixel."""
    return None if mask is None else mask[:, ::reduction, ::reduction]


def pool(features: Float[Tensor, "B h w D"], mask: Bool[Tensor, "B h w"] | None, pooling: str) -> Tensor:
    """The "avg" or "max" over the real tokens of a map, `[B, D]`, or for "" the map; zeros where no token is real."""
    if not pooling:
        return features
    if mask is None:
        return features.mean((1, 2)) if pooling == "avg" else features.amax((1, 2))
    count = mask.sum((1, 2)).unsqueeze(-1)
    if pooling == "avg":
        return without_padding(features, mask).sum((1, 2)) / count.clamp_min(1)
    highest = features.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax((1, 2))
    return highest.masked_fill(count == 0, 0)


def _height_and_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """`image_size` as (height, width), or None."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise InvalidArgument("image_size", expected="a side, (height, width) or None", got=size)
    for side in sides:
        check_positive(image_size=side)
    return sides


_PAPER: dict[str, Any] = {
    "image_size": 224, "num_classes": 1000, "channels": 3, "window_size": (7, (7, 14), (7, 14), 7),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "sepvit_lite": {**_PAPER, "dims": (32, 64, 128, 256), "depths": (1, 2, 6, 2), "heads": (1, 2, 4, 8)},
    "sepvit_tiny": {**_PAPER, "dims": (96, 192, 384, 768), "depths": (1, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "sepvit_small": {**_PAPER, "dims": (96, 192, 384, 768), "depths": (1, 2, 14, 2), "heads": (3, 6, 12, 24)},
    "sepvit_base": {**_PAPER, "dims": (128, 256, 512, 1024), "depths": (1, 2, 14, 2), "heads": (4, 8, 16, 32)},
}
