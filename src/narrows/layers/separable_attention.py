"""Separable attention on feature maps of any size."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.separable_attention import (
    PointwiseWeights,
    SeparableAttentionWeights,
    WindowOrder,
    separable_attention,
    window_token_attention,
)
from narrows.routing import Routing
from narrows.validation import check_mask, check_positive, check_tokens

NORM_EPS = 1e-6


class SeparableAttention(nn.Module):
    r"""Pre-norm separable self-attention on channels-last feature maps (Li et al. 2022, arXiv 2203.15380, section 3.2).

    A learned window token is put before the tokens of every window of `window_size` x `window_size` tokens, and both
    are normalised. Each window attends to itself and its window token; the windows then exchange their feature maps by
    attention between what the window tokens have become. Both steps add their input to their output. The formula is
    that of `narrows.ops.separable_attention.separable_attention`. With K windows of n tokens, each token takes part in
    n + K pairs, where full self-attention has K n.

    Feature maps may have any size: windows at the lower and right border are filled with padding that takes part in
    nothing. A block adds what comes out to what it put in.

    Args:
        dim: token width D.
        heads: number of heads, a divisor of `dim`.
        window_size: side of a window.
        window_grid: windows down and across for which there are window tokens of their own, for instance (8, 8); on
            another grid they are interpolated. (1, 1) is one token that all windows share, on any grid.
        pointwise: whether windows exchange what they hold. False leaves the attention inside windows, makes no window
            token and no other parameters for more: right where the network is trained on a single window.
        impl: "auto" or an implementation of `separable_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: heads do not divide the width.

    >>> attention = SeparableAttention(64, heads=2, window_size=7)
    >>> attention(torch.randn(1, 14, 25, 64)).shape
    torch.Size([1, 14, 25, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window_size: int,
        window_grid: tuple[int, int] = (1, 1),
        pointwise: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads, window_size=window_size)
        if dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of dim = {dim}", got=heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.window_size, self.impl = dim, heads, window_size, impl
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.window_token = nn.Parameter(torch.zeros(*window_grid, dim, **factory)) if pointwise else None
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.window_norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory) if pointwise else None
        self.window_query_key = nn.Linear(dim, 2 * dim, **factory) if pointwise else None
        self.out = nn.Linear(dim, dim, **factory)

    def weights(self, order: WindowOrder) -> SeparableAttentionWeights:
        """The parameters as `narrows.ops` takes them, for feature maps of that size: its window tokens, normalised."""
        token = pointwise = None
        if self.window_norm is not None and self.window_query_key is not None:
            token = self.norm(self._window_tokens(order))
            norm, query_key = self.window_norm, self.window_query_key
            pointwise = PointwiseWeights(norm.weight, norm.bias, query_key.weight, query_key.bias, norm.eps)
        return SeparableAttentionWeights(
            self.qkv.weight, token, pointwise, self.out.weight, self.out.bias, self.qkv.bias
        )

    def forward(
        self,
        feature_map: Float[Tensor, "B *layout D"],
        mask: Bool[Tensor, "B *layout"] | None = None,
        order: WindowOrder | None = None,
    ) -> Float[Tensor, "B *layout D"]:
        """Attended feature map.

        Args:
            feature_map: `[B, H, W, D]`; or `[B, N, D]`, its tokens in the order of `order`. A network whose blocks
                hand them on in that order moves nothing where windows divide the map.
            mask: True at real tokens; None where all are. No token attends to the others, and outputs there are 0.
            order: the order of `[B, N, D]`; its window sizes must contain `window_size`.
        """
        tokens, token_mask, order = self._in_order(feature_map, mask, order)
        size = self.window_size
        attended = separable_attention(
            order.windows(self.norm(tokens), size),
            self.weights(order),
            heads=self.heads,
            shortcuts=True,
            mask=order.window_mask(tokens, token_mask, size),
            impl=self.impl,
        )
        attended = order.tokens(attended, size)
        return attended if feature_map.ndim == 3 else order.restore(attended)

    def routing(
        self,
        feature_map: Float[Tensor, "B *layout D"],
        mask: Bool[Tensor, "B *layout"] | None = None,
        order: WindowOrder | None = None,
    ) -> Routing:
        """Which tokens each window token reads: those of its own window, by depthwise attention.

        A row sums to 1 less the share that the window token keeps of itself; without window tokens it is the mean of
        what the tokens of the window read. The attention between windows is left out: it moves feature maps from
        window to window, not tokens to window tokens.
        """
        tokens, token_mask, order = self._in_order(feature_map, mask, order)
        size = self.window_size
        window_mask = order.window_mask(tokens, token_mask, size)
        windows = order.windows(self.norm(tokens), size)
        reads = window_token_attention(windows, self.weights(order), heads=self.heads, mask=window_mask)
        # Window k reads nothing of another window l: the diagonal of [B, heads, K, K, n].
        everywhere = reads.transpose(2, 3).diag_embed().permute(0, 1, 3, 4, 2)
        on_map = order.restore(order.tokens(everywhere.flatten(0, 2).unsqueeze(-1), size))
        weights = on_map.flatten(1).unflatten(0, everywhere.shape[:3])
        return Routing(weights, "windows", grid=(order.height, order.width))

    def _in_order(
        self, feature_map: Tensor, mask: Tensor | None, order: WindowOrder | None
    ) -> tuple[Tensor, Tensor | None, WindowOrder]:
        check_tokens("feature_map", feature_map, dim=self.dim, layout="[B, H, W, D]" if order is None else "[B, N, D]")
        check_mask("mask", mask, feature_map.shape[:-1], layout="[B, H, W]" if order is None else "[B, N]")
        if order is not None:
            return feature_map, mask, order
        order = WindowOrder(feature_map.shape[1], feature_map.shape[2], (self.window_size,))
        return order.arrange(feature_map), None if mask is None else order.arrange(mask.unsqueeze(-1))[..., 0], order

    def _window_tokens(self, order: WindowOrder) -> Float[Tensor, "*K D"]:
        """One token for all windows, or one for each: `[D]` or `[K, D]`."""
        assert self.window_token is not None
        rows, columns, dim = self.window_token.shape
        if (rows, columns) == (1, 1):
            return self.window_token.view(dim)
        tokens, grid = self.window_token, order.grid(self.window_size)
        if grid != (rows, columns):
            resized = F.interpolate(tokens.permute(2, 0, 1)[None], grid, mode="bilinear", align_corners=False)
            tokens = resized[0].permute(1, 2, 0)
        return order.arrange_windows(tokens, self.window_size)
