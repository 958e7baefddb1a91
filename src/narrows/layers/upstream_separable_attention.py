"""Separable attention on feature maps, whole or cut into windows already."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.separable_attention import (
    PointwiseWeights,
    SeparableAttentionWeights,
    from_windows,
    separable_attention,
    to_windows,
    window_token_attention,
)
from narrows.routing import Routing
from narrows.validation import check_positive, check_tokens


class UpstreamSeparableAttention(nn.Module):
    r"""Separable self-attention on channels-last feature maps (Li et al. 2022, arXiv 2203.15380, section 3.2).

    Each window of `window_size` x `window_size` tokens attends to itself and to a learned window token; the windows
    then exchange their feature maps by attention between what the window tokens have become. The formula is that of
    `narrows.ops.separable_attention.separable_attention`. With K windows of n tokens, each token takes part in n + K
    pairs, where full self-attention has K n.

    Args:
        dim: token width D.
        heads: number of heads.
        window_size: side of a window; it must divide the height and the width of every feature map.
        head_dim: width of a head; `dim` need not be heads times it.
        pointwise: whether windows exchange what they hold. False leaves the attention inside windows and makes no
            parameters for more: right where a feature map is a single window, which could not train them.
        dropout: share of attention entries and of outputs dropped in training.
        impl: "auto" or an implementation of `separable_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: on call, where windows do not divide the feature map; the message names the nearest size.

    >>> attention = UpstreamSeparableAttention(64, heads=2, window_size=7)
    >>> attention(torch.randn(1, 14, 28, 64)).shape
    torch.Size([1, 14, 28, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window_size: int,
        head_dim: int = 32,
        pointwise: bool = True,
        dropout: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads, window_size=window_size, head_dim=head_dim)
        if not 0 <= dropout < 1:
            raise InvalidArgument("dropout", expected="a share in [0, 1)", got=dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = heads * head_dim
        self.dim, self.heads, self.window_size = dim, heads, window_size
        self.dropout, self.impl = dropout, impl
        self.window_token = nn.Parameter(torch.empty(dim, **factory))
        self.qkv = nn.Linear(dim, 3 * inner, bias=False, **factory)
        self.window_norm = nn.LayerNorm(head_dim, **factory) if pointwise else None
        self.window_query_key = nn.Linear(inner, 2 * inner, **factory) if pointwise else None
        self.out = nn.Linear(inner, dim, **factory)
        nn.init.trunc_normal_(self.window_token, std=0.02)

    def weights(self) -> SeparableAttentionWeights:
        """The parameters as `narrows.ops` takes them."""
        pointwise = None
        if self.window_norm is not None and self.window_query_key is not None:
            norm, query_key = self.window_norm, self.window_query_key
            pointwise = PointwiseWeights(norm.weight, norm.bias, query_key.weight, query_key.bias)
        return SeparableAttentionWeights(self.qkv.weight, self.window_token, pointwise, self.out.weight, self.out.bias)

    def forward(self, feature_map: Float[Tensor, "B *layout D"]) -> Float[Tensor, "B *layout D"]:
        """Attended feature map, in the layout it came in: `[B, H, W, D]`, or cut into windows `[B, Y, X, n, D]`.

        A network whose blocks hand windows on to each other moves its tokens once, not in every block.
        """
        windows = self._windows(feature_map)
        dropout = self.dropout if self.training else 0.0
        attended = separable_attention(
            windows.flatten(1, 2), self.weights(), heads=self.heads, dropout=dropout, impl=self.impl
        )
        attended = F.dropout(attended, dropout).view(windows.shape)
        return attended if feature_map.ndim == 5 else from_windows(attended, self.window_size)

    def routing(self, feature_map: Float[Tensor, "B *layout D"]) -> Routing:
        """Which tokens each window token reads: those of its own window, by depthwise attention.

        A row sums to 1 less the share that the window token keeps of itself. The attention between windows is left
        out: it moves feature maps from window to window, not tokens to window tokens.
        """
        windows = self._windows(feature_map)
        batch, rows, columns = windows.shape[:3]
        reads = window_token_attention(windows.flatten(1, 2), self.weights(), heads=self.heads)
        # Window k reads nothing of another window l: the diagonal of [B, heads, K, K, n], in raster order.
        everywhere = reads.transpose(2, 3).diag_embed().permute(0, 1, 3, 4, 2)
        raster = from_windows(everywhere.reshape(-1, rows, columns, self.window_size**2, 1), self.window_size)
        weights = raster.reshape(batch, self.heads, rows * columns, -1)
        return Routing(weights, "windows", grid=(rows * self.window_size, columns * self.window_size))

    def _windows(self, feature_map: Tensor) -> Tensor:
        if feature_map.ndim != 5:
            check_tokens("feature_map", feature_map, dim=self.dim, layout="[B, H, W, D]")
            return to_windows(feature_map, self.window_size)
        check_tokens("feature_map", feature_map, dim=self.dim, layout="[B, Y, X, n, D]")
        if feature_map.shape[3] != self.window_size**2:
            raise InvalidArgument(
                "feature_map",
                expected=f"windows of {self.window_size} x {self.window_size} tokens",
                got=f"shape {tuple(feature_map.shape)}",
            )
        return feature_map
