"""Separable attention on feature maps: the paper's, for any size, and the form that `vit-pytorch` published."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.separable_attention import (
    IMPLEMENTATIONS,
    WindowOrder,
    depthwise_attention,
    from_windows,
    pointwise_attention,
    to_windows,
    window_token_attention,
)
from narrows.routing import Routing
from narrows.validation import check_choice, check_mask, check_positive, check_share, check_tokens, checked

NORM_EPS = 1e-6


class SeparableAttention(nn.Module):
    r"""Pre-norm separable self-attention on channels-last feature maps (Li et al. 2022, arXiv 2203.15380, section 3.2).

    A learned window token w is put before the n tokens $x_k$ of every window of `window_size` x `window_size` tokens,
    and both are normalised. Each window attends to itself and its window token; the windows then exchange their feature
    maps by attention between what the window tokens have become. Both steps add their input to their output. For each
    head

    $$[\hat w_k; \hat x_k] = \mathrm{softmax}(q k^\top / \sqrt d)\, v + [w; x_k],
      \qquad (q, k, v) = W_{qkv} [w; x_k] + b_{qkv}$$

    $$y_k = W_o \Big(\sum_l \mathrm{softmax}_l\big(q_k \cdot k_l / \sqrt d\big)\, \hat x_l + \hat x_k\Big) + b_o,
      \qquad (q_k, k_k) = W_{qk}\, \mathrm{GELU}(\mathrm{LN}(\hat w_k)) + b_{qk}$$

    With K windows, each token takes part in n + K pairs, where full self-attention has K n.

    Feature maps may have any size: windows at the lower and right border are filled with padding that takes part in
    nothing. A map of a single window skips the second step. A block adds what comes out to what it put in.

    Args:
        dim: token width D.
        heads: number of heads, a divisor of `dim`.
        window_size: side of a window.
        window_grid: windows down and across for which there are window tokens of their own, for instance (8, 8); on
            another grid they are interpolated. (1, 1) is one token that all windows share, on any grid.
        pointwise: whether windows exchange what they hold. Without it there are no window tokens and no parameters of
            the second step: right where the network is trained on a single window.
        impl: "auto" or an implementation of `narrows.ops.separable_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: heads do not divide the width.

    >>> attention = SeparableAttention(64, heads=2, window_size=7)
    >>> attention(torch.randn(1, 14, 25, 64)).shape
    torch.Size([1, 14, 25, 64])
    """

    @checked
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
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        if dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of dim = {dim}", got=heads)
        check_positive(**{f"window_grid[{axis}]": count for axis, count in enumerate(window_grid)})
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.window_size, self.impl = dim, heads, window_size, impl
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.window_token = nn.Parameter(torch.zeros(*window_grid, dim, **factory)) if pointwise else None
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.window_norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory) if pointwise else None
        self.window_query_key = nn.Linear(dim, 2 * dim, **factory) if pointwise else None
        self.out = nn.Linear(dim, dim, **factory)

    def reset_parameters(self) -> None:
        """Window tokens start at zero, linear maps and norms as torch's do."""
        _reset(self)
        if self.window_token is not None:
            nn.init.zeros_(self.window_token)

    def forward(
        self,
        feature_map: Float[Tensor, "B *layout D"],
        mask: Bool[Tensor, "B *layout"] | None = None,
        order: WindowOrder | None = None,
    ) -> Float[Tensor, "B *layout D"]:
        """Attended feature map.

        Args:
            feature_map: `[B, H, W, D]`; or `[B, N, D]`, its tokens in the order of `order`. A network whose blocks
                pass them on in that order moves nothing where windows divide the map.
            mask: True at real tokens; None where all are. No token attends to the others, NaN included, and outputs
                there are 0.
            order: the order of `[B, N, D]`; its window sizes must contain `window_size`.
        """
        tokens, token_mask, order = self._in_order(feature_map, mask, order)
        window_mask = order.window_mask(tokens, token_mask, self.window_size)
        normed = self._normed_windows(tokens, order)  # [B, K, L, D]
        query, key, value = self._query_key_value(normed)

        maps = depthwise_attention(query, key, value, window_mask, impl=self.impl)
        maps = maps + normed.unflatten(-1, (self.heads, -1))
        if self.window_norm is not None and self.window_query_key is not None:
            activated = F.gelu(self.window_norm(maps[:, :, 0].flatten(-2)))
            query, key = _by_heads(self.window_query_key(activated), self.heads)
            maps = pointwise_attention(maps[:, :, 1:], query, key, window_mask, shortcut=True, impl=self.impl)
        result = self.out(maps.flatten(-2))
        if window_mask is not None:
            result = result.masked_fill(~window_mask.unsqueeze(-1), 0)
        result = order.tokens(result, self.window_size)
        return result if feature_map.ndim == 3 else order.restore(result)

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
        query, key, _ = self._query_key_value(self._normed_windows(tokens, order))
        window_mask = order.window_mask(tokens, token_mask, size)
        reads = window_token_attention(query, key, window_mask, window_token=self.window_token is not None)
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
        if mask is not None:
            # Before the norm: gradients of parameters would take in 0 * NaN otherwise.
            feature_map = feature_map.masked_fill(~mask.unsqueeze(-1), 0)
        if order is not None:
            return feature_map, mask, order
        order = WindowOrder(feature_map.shape[1], feature_map.shape[2], (self.window_size,))
        return order.arrange(feature_map), None if mask is None else order.arrange(mask.unsqueeze(-1))[..., 0], order

    def _normed_windows(self, tokens: Float[Tensor, "B N D"], order: WindowOrder) -> Float[Tensor, "B K L D"]:
        """The tokens of each window, its window token before them if there is one."""
        window_token = self.window_token
        # Where windows are views, all is normalised together; where they are padded copies, before that.
        together = order.nested
        windows = order.windows(tokens if together else self.norm(tokens), self.window_size)
        if window_token is not None:
            shared, grid = tuple(window_token.shape[:2]) == (1, 1), order.grid(self.window_size)
            if not shared and grid != tuple(window_token.shape[:2]):
                resized = F.interpolate(window_token.permute(2, 0, 1)[None], grid, mode="bilinear", align_corners=False)
                window_token = resized[0].permute(1, 2, 0)
            window_token = window_token if together else self.norm(window_token)
            one_each = window_token[0] if shared else order.arrange_windows(window_token, self.window_size)
            windows = _with_first(one_each, windows)
        return self.norm(windows) if together else windows

    def _query_key_value(self, normed: Float[Tensor, "B K L D"]) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, K, L, heads, d]` each."""
        query, key, value = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return query, key, value


class UpstreamSeparableAttention(nn.Module):
    r"""Separable self-attention on channels-last feature maps, as `vit_pytorch.sep_vit` has it.

    Each window of `window_size` x `window_size` tokens attends to itself and to a learned window token; the windows
    then exchange their feature maps by attention between what the window tokens have become (Li et al. 2022, arXiv
    2203.15380, section 3.2). Unlike `SeparableAttention`, neither step adds its input, window tokens are normalised for
    each head alone, and windows must divide the map.

    Args:
        dim: token width D.
        heads: number of heads.
        window_size: side of a window; it must divide the height and the width of every feature map.
        head_dim: width of a head; `dim` need not be heads times it.
        pointwise: whether windows exchange what they hold. Without it there are no parameters of that step: right where
            a feature map is a single window, which could not train them.
        dropout: share of attention entries and of outputs dropped in training.
        impl: "auto" or an implementation of `narrows.ops.separable_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: on call, where windows do not divide the feature map; the message names the nearest size.

    >>> attention = UpstreamSeparableAttention(64, heads=2, window_size=7)
    >>> attention(torch.randn(1, 14, 28, 64)).shape
    torch.Size([1, 14, 28, 64])
    """

    @checked
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
        check_share(dropout=dropout)
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = heads * head_dim
        self.dim, self.heads, self.window_size = dim, heads, window_size
        self.dropout, self.impl = dropout, impl
        self.window_token = nn.Parameter(torch.empty(dim, **factory))
        self.qkv = nn.Linear(dim, 3 * inner, bias=False, **factory)
        self.window_norm = nn.LayerNorm(head_dim, **factory) if pointwise else None
        self.window_query_key = nn.Linear(inner, 2 * inner, **factory) if pointwise else None
        self.out = nn.Linear(inner, dim, **factory)
        self._reset_window_token()

    def reset_parameters(self) -> None:
        """The window token from a truncated normal of 0.02; linear maps and the norm as torch's do."""
        _reset(self)
        self._reset_window_token()

    @torch.no_grad()
    def _reset_window_token(self) -> None:
        # float32: the truncated normal is drawn by way of uniform numbers, of which low precision has few.
        self.window_token.copy_(nn.init.trunc_normal_(self.window_token.float(), std=0.02))

    def forward(self, feature_map: Float[Tensor, "B *layout D"]) -> Float[Tensor, "B *layout D"]:
        """Attended feature map, in the layout it came in: `[B, H, W, D]`, or cut into windows `[B, Y, X, n, D]`.

        A network whose blocks pass windows on to each other moves its tokens once, not in every block.
        """
        cut = self._windows(feature_map)
        windows, dropout = cut.flatten(1, 2), self.dropout if self.training else 0.0
        query, key, value = self._query_key_value(windows)
        attended = depthwise_attention(query, key, value, dropout=dropout, impl=self.impl)
        maps = attended[:, :, 1:]
        if self.window_norm is not None and self.window_query_key is not None:
            activated = F.gelu(self.window_norm(attended[:, :, 0])).flatten(-2)
            query, key = _by_heads(self.window_query_key(activated), self.heads)
            maps = pointwise_attention(maps, query, key, dropout=dropout, impl=self.impl)
        result = F.dropout(self.out(maps.flatten(-2)), dropout).unflatten(1, cut.shape[1:3])
        return result if feature_map.ndim == 5 else from_windows(result, self.window_size)

    def routing(self, feature_map: Float[Tensor, "B *layout D"]) -> Routing:
        """Which tokens each window token reads: those of its own window, by depthwise attention.

        A row sums to 1 less the share that the window token keeps of itself. The attention between windows is left
        out: it moves feature maps from window to window, not tokens to window tokens.
        """
        windows = self._windows(feature_map)
        batch, rows, columns = windows.shape[:3]
        query, key, _ = self._query_key_value(windows.flatten(1, 2))
        reads = window_token_attention(query, key)
        # Window k reads nothing of another window l: the diagonal of [B, heads, K, K, n], in raster order.
        everywhere = reads.transpose(2, 3).diag_embed().permute(0, 1, 3, 4, 2)
        raster = from_windows(everywhere.reshape(-1, rows, columns, self.window_size**2, 1), self.window_size)
        weights = raster.reshape(batch, self.heads, rows * columns, -1)
        return Routing(weights, "windows", grid=(rows * self.window_size, columns * self.window_size))

    def _query_key_value(self, windows: Float[Tensor, "B K n D"]) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, K, 1 + n, heads, d]` each, the window token's first."""
        projected = self.qkv(_with_first(self.window_token, windows))
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return query, key, value

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


def _by_heads(query_key: Float[Tensor, "B K C"], heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of windows, `[B, K, heads, d]` each, brought into the order of products over heads together."""
    query, key = query_key.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).contiguous().transpose(2, 3).unbind(0)
    return query, key


def _with_first(window_token: Float[Tensor, "*K D"], windows: Float[Tensor, "B K n D"]) -> Float[Tensor, "B K L D"]:
    """The window token before the tokens of every window: of all that attention needs, they are the narrowest."""
    return torch.cat((window_token.expand(*windows.shape[:2], -1).unsqueeze(2), windows), 2)


def _reset(layer: nn.Module) -> None:
    for module in layer.children():
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
