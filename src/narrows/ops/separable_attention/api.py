"""The public functions of separable attention."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.precision import at_least_float32, autocast_off
from narrows.ops.separable_attention.common import SeparableAttentionWeights
from narrows.ops.separable_attention.fused import fused
from narrows.ops.separable_attention.reference import reference
from narrows.validation import check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "the paper's formula, attention matrices in memory, float32 or better"),
    "fused": Implementation(fused, "fused attention inside windows, one batched product between them"),
}


def separable_attention(
    windows: Float[Tensor, "B K n D"],
    weights: SeparableAttentionWeights,
    *,
    heads: int,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "B K n D"]:
    r"""Depthwise separable self-attention over the K windows of a feature map (Li et al. 2022, section 3.2).

    A window token $w$ is put before the n tokens $x_k$ of every window k. Depthwise, each window attends to itself,

    $$[\hat w_k; \hat x_k] = \mathrm{softmax}(q k^\top / \sqrt d)\, v, \qquad (q, k, v) = W_{qkv} [w; x_k]$$

    and pointwise, windows exchange their feature maps by what their tokens have become:

    $$y_k = W_o \sum_l \mathrm{softmax}_l\big(q_k \cdot k_l / \sqrt d\big)\, \hat x_l,
      \qquad (q_k, k_k) = W_{qk}\, \mathrm{GELU}(\mathrm{LN}(\hat w_k)).$$

    Everything happens for each head on its own, except that $W_{qk}$ and $W_o$ read all heads.

    Args:
        windows: `[B, K, n, D]`, K windows of n tokens.
        weights: see `SeparableAttentionWeights`; without `pointwise` windows exchange nothing.
        heads: number of heads.
        dropout: share of the entries of both attention matrices that are dropped; 0 in evaluation.
        impl: "auto" or a name in `IMPLEMENTATIONS`.

    Returns:
        `[B, K, n, D]`.

    Raises:
        InvalidArgument: `windows` has another shape, or `impl` is no implementation.
    """
    check_tokens("windows", windows, dim=weights.window_token.shape[0], layout="[B, K, n, D]")
    run = resolve("separable_attention", impl, IMPLEMENTATIONS, auto="fused")
    return run(windows, weights, heads=heads, dropout=dropout)


def window_token_attention(
    windows: Float[Tensor, "B K n D"], weights: SeparableAttentionWeights, *, heads: int
) -> Float[Tensor, "B heads K n"]:
    r"""How much of each token of its window every window token reads: `[B, heads, K, n]`, in float32 or better.

    The first row of the depthwise attention, without its first entry: what is missing from a sum of 1 over the n tokens
    is the share that the window token keeps of itself.
    """
    check_tokens("windows", windows, dim=weights.window_token.shape[0], layout="[B, K, n, D]")
    with autocast_off(windows):
        token, qkv = at_least_float32(weights.window_token), at_least_float32(weights.qkv)
        token_query, token_key, _ = (qkv @ token).unflatten(0, (3, heads, -1))  # [heads, d]
        key = (at_least_float32(windows) @ qkv.chunk(3)[1].T).unflatten(-1, (heads, -1))
        scores = torch.einsum("hd,bknhd->bhkn", token_query, key)
        own = (token_query * token_key).sum(-1)[:, None, None].expand(*scores.shape[:-1], 1)
        scaled = torch.cat((own, scores), -1) * token_query.shape[-1] ** -0.5
        return scaled.softmax(-1)[..., 1:]
