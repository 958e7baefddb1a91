"""The public functions of separable attention."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.separable_attention.common import SeparableAttentionWeights, keys_of_windows
from narrows.ops.separable_attention.fused import fused
from narrows.ops.separable_attention.reference import reference
from narrows.precision import at_least_float32, autocast_off
from narrows.validation import check_mask, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "the paper's formula, attention matrices in memory, float32 or better"),
    "fused": Implementation(fused, "fused attention inside windows, one batched product between them"),
}


def separable_attention(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    shortcuts: bool = False,
    mask: Bool[Tensor, "B K n"] | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "B K n D"]:
    r"""Depthwise separable self-attention over the K windows of a feature map (Li et al. 2022, section 3.2).

    A window token $w$ is put before the n tokens $x_k$ of every window k. Depthwise, each window attends to itself,

    $$[\hat w_k; \hat x_k] = \mathrm{softmax}(q k^\top / \sqrt d)\, v, \qquad (q, k, v) = W_{qkv} [w; x_k] + b_{qkv}$$

    and pointwise, windows exchange their feature maps by what their tokens have become:

    $$y_k = W_o \sum_l \mathrm{softmax}_l\big(q_k \cdot k_l / \sqrt d\big)\, \hat x_l,
      \qquad (q_k, k_k) = W_{qk}\, \mathrm{GELU}(\mathrm{LN}(\hat w_k)).$$

    Everything happens for each head on its own, except that $W_{qk}$, $W_o$ and, where it is as wide as all heads, the
    norm read all of them. With `shortcuts`, as in the paper's network, the input is added to what each step makes of
    it: $[w; x_k]$ to $[\hat w_k; \hat x_k]$, and $\hat x_k$ to the sum over l; a single window then skips the second
    step. Padding is no key of either step: place i of window k takes from the windows whose place i is real.

    Args:
        windows: `[B, K, n, D]`, K windows of n tokens.
        weights: see `SeparableAttentionWeights`; without `pointwise` windows exchange nothing.
        heads: number of heads.
        shortcuts: add the input of both steps to their output; D must be heads times the width of a head.
        mask: `[B, K, n]`, True at real tokens; None where all are. Outputs at the others are 0.
        dropout: share of the entries of both attention matrices that are dropped; 0 in evaluation.
        impl: "auto" or a name in `IMPLEMENTATIONS`.

    Returns:
        `[B, K, n, D]`.

    Raises:
        InvalidArgument: `windows`, `mask` or the weights have shapes that do not fit, or `impl` is no implementation.
    """
    dim, inner = weights.out.shape
    check_tokens("windows", windows, dim=dim, layout="[B, K, n, D]")
    check_mask("mask", mask, windows.shape[:3], layout="[B, K, n]")
    if shortcuts and inner != dim:
        raise InvalidArgument("weights.out", expected=f"as many columns as rows with shortcuts: {dim}", got=inner)
    if weights.window_token is None and weights.pointwise is not None:
        raise InvalidArgument("weights.window_token", expected="a token, which weights.pointwise reads", got=None)
    run = resolve("separable_attention", impl, IMPLEMENTATIONS, auto="fused")
    return run(windows, weights, heads=heads, shortcuts=shortcuts, mask=mask, dropout=dropout)


def window_token_attention(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    mask: Bool[Tensor, "B K n"] | None = None,
) -> Float[Tensor, "B heads K n"]:
    r"""How much of each token of its window every window token reads: `[B, heads, K, n]`, in float32 or better.

    The first row of the depthwise attention, without its first entry: what is missing from a sum of 1 over the n tokens
    is the share that the window token keeps of itself. Where there are no window tokens, it is the mean of what the
    tokens of the window read, and sums to 1.
    """
    check_tokens("windows", windows, dim=weights.out.shape[0], layout="[B, K, n, D]")
    check_mask("mask", mask, windows.shape[:3], layout="[B, K, n]")
    tokens = at_least_float32(windows)
    bias = None if weights.qkv_bias is None else at_least_float32(weights.qkv_bias)
    if weights.window_token is not None:
        first = at_least_float32(weights.window_token).expand(*windows.shape[:2], -1).unsqueeze(2)
        tokens = torch.cat((first, tokens), 2)
    with autocast_off(windows):
        query, key, _ = F.linear(tokens, at_least_float32(weights.qkv), bias).unflatten(-1, (3, heads, -1)).unbind(-3)
        readers = query if weights.window_token is None else query[:, :, :1]
        scores = torch.einsum("bkqhd,bknhd->bhkqn", readers, key) * query.shape[-1] ** -0.5
        if mask is not None:
            keys = keys_of_windows(mask, window_token=weights.window_token is not None)
            scores = scores.masked_fill(~keys[:, None, :, None], -torch.inf)
        reads = scores.softmax(-1)[..., -windows.shape[2] :]
        if mask is None:
            return reads.mean(-2)
        asked = mask if weights.window_token is None else mask.new_ones(1, 1, 1)
        reads = reads * asked[:, None, :, :, None]
        return reads.sum(-2) / asked.sum(-1).clamp_min(1)[:, None, :, None] * mask[:, None]
