"""What SepViT is made of: stochastic depth, block, stage, and how they start."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrows.layers.separable_attention import NORM_EPS, SeparableAttention
from narrows.models.parts import FeedForward
from narrows.models.sepvit.arguments import StageShape
from narrows.models.sepvit.padding import without_padding
from narrows.ops.separable_attention import WindowOrder


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


class Block(nn.Module):
    """Pre-norm transformer block on tokens `[B, N, D]` in the order of their windows.

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


class Stage(nn.Module):
    """Overlapping patch embedding, then blocks with a conditional position encoding after the first.

    `[B, H, W, C]` becomes `[B, H / stride, W / stride, dim]`, rounded up. The blocks keep their tokens in an order in
    which windows are views; only the convolutions need them in raster order.

    Args:
        channels: width of the incoming feature map.
        shape: what the stage is made for.
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
            Block(
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
        embedded = self.embedding_norm(_convolve(self.embedding, feature_map))
        order = WindowOrder(embedded.shape[1], embedded.shape[2], self.window_sizes)
        token_mask = None if mask is None else order.arrange(mask.unsqueeze(-1)).squeeze(-1)
        tokens = order.arrange(embedded)
        for index, block in enumerate(self.blocks):
            tokens = self._run(block, tokens, token_mask, order)
            if index == 0:
                raster = order.restore(without_padding(tokens, token_mask))
                tokens = tokens + order.arrange(_convolve(self.position, raster))
        return order.restore(without_padding(tokens, token_mask))

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.grad_checkpointing and self.training and not torch.compiler.is_exporting():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


def initialise(module: nn.Module) -> None:
    """The paper's initialisation: truncated normal of 0.02, convolutions by their fan-out, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _convolve(convolution: nn.Conv2d, feature_map: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
    return convolution(feature_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
