"""The public functions of separable attention."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.separable_attention import fused, reference
from narrows.precision import at_least_float32, autocast_off
from narrows.validation import check_mask, check_tokens

# Of attention inside windows; attention between them has an implementation of the same name for each.
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(
        reference.depthwise_attention, "the paper's formula, attention matrices in memory, float32 or better"
    ),
    "fused": Implementation(
        fused.depthwise_attention, "fused attention inside windows, one batched product between them"
    ),
}
BETWEEN_WINDOWS: Mapping[str, Implementation] = {
    "reference": Implementation(reference.pointwise_attention, "place by place, float32 or better"),
    "fused": Implementation(fused.pointwise_attention, "one batched product"),
}


def depthwise_attention(
    query: Float[Tensor, "B K L heads d"],
    key: Float[Tensor, "B K L heads d"],
    value: Float[Tensor, "B K L heads d"],
    mask: Bool[Tensor, "B K n"] | None = None,
    *,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "B K L heads d"]:
    r"""Self-attention inside each of K windows: the depthwise half of separable attention (Li et al. 2022, 3.2).

    For every window and head,

    $$[\hat w; \hat x] = \mathrm{softmax}(q k^\top / \sqrt d)\, v, \qquad (q, k, v) = W_{qkv} [w; x]$$

    with the n tokens x of the window and, before them, its window token w where it has one: L is n + 1 or n.

    Args:
        query, key, value: `[B, K, L, heads, d]`.
        mask: `[B, K, n]`, True at real tokens; None where all are. Padding is no key; what it reads means nothing.
        dropout: share of the entries of the attention matrices that are dropped; 0 in evaluation.
        impl: "auto" or a name in `IMPLEMENTATIONS`.

    Raises:
        InvalidArgument: shapes that do not fit, or `impl` is no implementation.
        InvalidType: `query` is not floating-point, or `mask` is not boolean.
    """
    check_tokens("query", query, layout="[B, K, L, heads, d]")
    for name, other in {"key": key, "value": value}.items():
        if other.shape != query.shape:
            raise InvalidArgument(name, expected=f"the shape of query {tuple(query.shape)}", got=tuple(other.shape))
    run = resolve("depthwise_attention", impl, IMPLEMENTATIONS, auto="fused")
    return run(query, key, value, _keys(mask, key), dropout)


def pointwise_attention(
    maps: Float[Tensor, "B K n heads d"],
    query: Float[Tensor, "B K heads d"],
    key: Float[Tensor, "B K heads d"],
    mask: Bool[Tensor, "B K n"] | None = None,
    *,
    shortcut: bool = False,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "B K n heads d"]:
    r"""Windows take from each other's tokens: the pointwise half of separable attention (Li et al. 2022, 3.2).

    The attention between window tokens says how much a window takes of each other, the same at all of its n places:

    $$y_{k,i} = \sum_l \mathrm{softmax}_l(q_k \cdot k_l / \sqrt d)\, \hat x_{l,i} \; (+\, \hat x_{k,i}), \qquad
      (q_k, k_k) = W_{qk}\, \mathrm{GELU}(\mathrm{LN}(\hat w_k))$$

    Place i of a window takes from those windows only whose place i is real.

    Args:
        maps: `[B, K, n, heads, d]`, the tokens of K windows after attention inside them.
        query, key: `[B, K, heads, d]`, of the window tokens.
        mask: `[B, K, n]`, True at real tokens; None where all are. What padding takes means nothing.
        shortcut: add `maps` to what is taken; an image with a single window then takes nothing.
        dropout: share of the entries of the attention matrix that are dropped; 0 in evaluation.
        impl: "auto" or a name in `IMPLEMENTATIONS`.

    Raises:
        InvalidArgument: shapes that do not fit, or `impl` is no implementation.
        InvalidType: `maps` is not floating-point, or `mask` is not boolean.
    """
    check_tokens("maps", maps, layout="[B, K, n, heads, d]")
    expected = (*maps.shape[:2], *maps.shape[3:])
    for name, other in {"query": query, "key": key}.items():
        if tuple(other.shape) != expected:
            raise InvalidArgument(name, expected=f"shape [B, K, heads, d] = {expected}", got=tuple(other.shape))
    check_mask("mask", mask, maps.shape[:3], layout="[B, K, n]")
    run = resolve("pointwise_attention", impl, BETWEEN_WINDOWS, auto="fused")
    return run(maps, query, key, mask, shortcut, dropout)


def window_token_attention(
    query: Float[Tensor, "B K L heads d"],
    key: Float[Tensor, "B K L heads d"],
    mask: Bool[Tensor, "B K n"] | None = None,
    *,
    window_token: bool = True,
) -> Float[Tensor, "B heads K n"]:
    r"""How much of each token of its window every window token reads: `[B, heads, K, n]`, in float32 or better.

    The first row of the attention matrix of `depthwise_attention`, without its first entry: what is missing from a sum
    of 1 over the n tokens is the share that the window token keeps of itself.

    Args:
        query, key: what `depthwise_attention` takes.
        mask: what `depthwise_attention` takes. Padding is read by nobody and gives 0.
        window_token: whether the first of the L tokens of a window is its window token. Without one, it is the mean of
            what the real tokens of the window read, and sums to 1.
    """
    check_tokens("query", query, layout="[B, K, L, heads, d]")
    keys = _keys(mask, key)
    with autocast_off(query):
        readers = at_least_float32(query[:, :, :1] if window_token else query)
        scores = torch.einsum("bkqhd,bknhd->bhkqn", readers, at_least_float32(key)) * query.shape[-1] ** -0.5
        if keys is not None:
            scores = scores.masked_fill(~keys[:, None, :, None], -torch.inf)
        reads = scores.softmax(-1)
        if window_token:
            return reads[..., 0, 1:]
        if mask is None:
            return reads.mean(-2)
        counts = mask.sum(-1).clamp_min(1)[:, None, :, None]
        return (reads * mask[:, None, :, :, None]).sum(-2) / counts * mask[:, None]


def _keys(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Which of the L tokens of a window may be read, `[B, K, L]`: the real ones, and the window token if there is one.

    Without one, a window of padding alone would leave its softmax nothing: such a window reads its padding.
    """
    if mask is None:
        return None
    batch, windows, length = key.shape[:3]
    n = length if mask.shape[-1] == length else length - 1
    check_mask("mask", mask, (batch, windows, n), layout="[B, K, n]")
    return mask | ~mask.any(-1, keepdim=True) if n == length else F.pad(mask, (1, 0), value=True)
