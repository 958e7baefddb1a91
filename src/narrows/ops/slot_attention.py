"""Slot attention on queries, keys and values: K slots compete for N tokens and read a weighted mean of what they win.

One file, since reference and fast form are the same few lines: `mixed` differs from `reference` in the dtype in which
products with tokens run, and in what it keeps for backward.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation
from narrows.precision import accumulation_dtype, autocast_off, is_transformed
from narrows.validation import check_choice, check_mask, check_tokens


class SlotAttentionResult(NamedTuple):
    """What the slots have read, and with which weights.

    Args:
        updates: `[B, H, K, V]`, the weighted means of the values.
        attention: `[B, H, K, N]`, the softmax over the slots, 0 at masked tokens and masked slots.
    """

    updates: Float[Tensor, "B H K V"]
    attention: Float[Tensor, "B H K N"]


def slot_attention(
    queries: Float[Tensor, "B H K E"],
    keys: Float[Tensor, "B G N E"],
    values: Float[Tensor, "B G N V"],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
    *,
    bias: Float[Tensor, "B H K"] | None = None,
    scale: float | None = None,
    joint_heads: bool = False,
    eps: float = 1e-8,
    impl: str = "auto",
) -> SlotAttentionResult:
    r"""Let slots compete for tokens, and give each the weighted mean of what it won: lines 7 and 8 of Algorithm 1.

    \[ A = \mathrm{softmax}_{slots}(s\, q k^T + b), \quad u_k = \sum_n \frac{A_{kn} + \epsilon}{\sum_m A_{km} +
       \epsilon} v_n \]

    Args:
        queries: of the slots, `[B, H, K, E]` in H heads.
        keys: of the tokens, `[B, H, N, E]`; `[B, 1, N, E]` where all heads share them.
        values: of the tokens, `[B, H, N, V]` or `[B, 1, N, V]`.
        mask: `[B, N]`, True at real tokens. Keys and values must be finite at the others, too.
        slot_mask: `[B, K]`, True at real slots. The others take no part in the softmax and have attention 0.
        bias: b, added to all logits of a slot.
        scale: s; `E ** -0.5` if None.
        joint_heads: one softmax over slots and heads together, rather than one per head.
        eps: added to the attention before it is averaged over tokens, positive: a slot that won nothing reads the plain
            mean.
        impl: "reference" computes in float32 or better; "mixed", which "auto" takes, multiplies in the dtype of the
            keys, computes the softmax and all sums in float32 or better, and keeps for backward one `[B, H, K, N]`.

    Returns:
        Both in float32, or in float64 where an argument is. A sample without any real token has read zeros.

    Raises:
        InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.

    Locatello et al., Object-Centric Learning with Slot Attention, NeurIPS 2020, https://arxiv.org/abs/2006.15055.
    """
    check_tokens("queries", queries, layout="[B, H, K, E]")
    check_tokens("keys", keys, dim=queries.shape[-1], layout="[B, H, N, E]")
    batch, heads, num_slots, _ = queries.shape
    if keys.shape[0] != batch or keys.shape[1] not in (1, heads) or values.shape[:3] != keys.shape[:3]:
        raise InvalidArgument(
            "keys and values",
            expected=f"B = {batch}, and H = {heads} or 1, in both",
            got=f"{tuple(keys.shape)} and {tuple(values.shape)}",
        )
    check_mask("mask", mask, (batch, keys.shape[2]))
    check_mask("slot_mask", slot_mask, (batch, num_slots), layout="[B, K]")
    if not eps > 0:
        raise InvalidArgument("eps", expected="a positive number", got=eps)
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    if scale != 1:
        queries = queries * (queries.shape[-1] ** -0.5 if scale is None else scale)
    run = IMPLEMENTATIONS["mixed" if impl == "auto" else impl].run
    return SlotAttentionResult(*run(queries, bias, keys, values, mask, slot_mask, joint_heads, eps))


def read_slots(
    queries: Float[Tensor, "B N E"],
    keys: Float[Tensor, "B K E"],
    values: Float[Tensor, "B K V"],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
    *,
    scale: float | None = None,
    normalization: str = "slots",
    eps: float = 1e-8,
    impl: str = "auto",
) -> Float[Tensor, "B N V"]:
    r"""What each token reads of the slots: \(\sum_k P_{kn} v_k\), the other direction of two-way slot attention.

    Args:
        queries: of the tokens, `[B, N, E]`.
        keys: of the slots, `[B, K, E]`.
        values: of the slots, `[B, K, V]`.
        mask: `[B, N]`, True at real tokens.
        slot_mask: `[B, K]`, True at real slots. A sample without any reads zeros.
        scale: of the logits; `E ** -0.5` if None.
        normalization: P is the softmax over the slots, so that each token reads a mean of them ("slots"), or that
            divided by its sum over the tokens ("tokens").
        eps: added to the softmax before it is divided by its sum over the tokens.
        impl: "reference" computes in float32 or better; "mixed", which "auto" takes, multiplies in the dtype of the
            queries.
    """
    with autocast_off(queries):
        dtype = accumulation_dtype(queries, keys, values)
        product_dtype = dtype if impl == "reference" else queries.dtype
        keys = keys.to(dtype) * (keys.shape[-1] ** -0.5 if scale is None else scale)
        logits = (keys.to(product_dtype) @ queries.to(product_dtype).mT).to(dtype)
        weights = token_weights(logits, mask, slot_mask, normalization=normalization, eps=eps)
        return weights.mT.to(product_dtype) @ values.to(product_dtype)


def token_weights(
    logits: Float[Tensor, "B K N"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    *,
    normalization: str,
    eps: float,
) -> Float[Tensor, "B K N"]:
    """How much token n reads of slot k: the softmax over the slots, divided by its sum over "tokens" if asked to."""
    attention = softmax_over_slots(logits[:, None], mask, slot_mask)
    if normalization == "tokens":
        attention, _ = mean_weights(attention, mask, eps)
        if slot_mask is not None:  # a masked slot would get eps / (N * eps) = 1 / N of every token
            attention = attention.masked_fill(~slot_mask[:, None, :, None], 0)
    return attention.squeeze(1)


def softmax_over_slots(
    logits: Float[Tensor, "B H K N"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    *,
    joint_heads: bool = False,
) -> Float[Tensor, "B H K N"]:
    """For each token a softmax over the slots, in each head or over all heads together; 0 where either is masked."""
    if slot_mask is not None:
        absent = ~slot_mask[:, None, :, None]
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
    attention = logits.flatten(1, 2).softmax(1).view(logits.shape) if joint_heads else logits.softmax(2)
    if slot_mask is not None:
        attention = attention.masked_fill(absent, 0)  # pyright: ignore[reportPossiblyUnboundVariable]
    return attention if mask is None else attention.masked_fill(~mask[:, None, None], 0)


def mean_weights(
    attention: Float[Tensor, "B H K N"], mask: Bool[Tensor, "B N"] | None, eps: float
) -> tuple[Float[Tensor, "B H K N"], Float[Tensor, "B H K 1"]]:
    """`(attention + eps) / total` and the total over the real tokens; all 0 over `eps` where there are none."""
    weights = attention + (eps if mask is None else eps * mask[:, None, None].to(attention.dtype))
    total = weights.sum(-1, keepdim=True).clamp_min(eps)
    return weights / total, total


def slot_attention_reference(
    queries: Float[Tensor, "B H K E"],
    bias: Float[Tensor, "B H K"] | None,
    keys: Float[Tensor, "B G N E"],
    values: Float[Tensor, "B G N V"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    joint_heads: bool,
    eps: float,
) -> tuple[Float[Tensor, "B H K V"], Float[Tensor, "B H K N"]]:
    """The formula in float32 or better."""
    with autocast_off(keys):
        dtype = accumulation_dtype(queries, keys, values)
        logits = queries.to(dtype) @ keys.to(dtype).mT
        if bias is not None:
            logits = logits + bias[..., None]
        attention = softmax_over_slots(logits, mask, slot_mask, joint_heads=joint_heads)
        weights, _ = mean_weights(attention, mask, eps)
        return weights @ values.to(dtype), attention


def slot_attention_mixed(
    queries: Float[Tensor, "B H K E"],
    bias: Float[Tensor, "B H K"] | None,
    keys: Float[Tensor, "B G N E"],
    values: Float[Tensor, "B G N V"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    joint_heads: bool,
    eps: float,
) -> tuple[Float[Tensor, "B H K V"], Float[Tensor, "B H K N"]]:
    """Products with tokens in the dtype of the keys, everything else in float32 or better. Twice differentiable."""
    with autocast_off(keys):
        queries = queries.to(accumulation_dtype(queries, keys, values))
        arguments = (queries, bias, keys, None if values is keys else values, mask, slot_mask, joint_heads, eps)
        run = _read if is_transformed(*(x for x in arguments[:4] if x is not None)) else _Read.apply
        return run(*arguments)  # pyright: ignore[reportReturnType]


class _Read(torch.autograd.Function):
    """Of a whole read, backward keeps the arguments and the attention.

    Per slot, with w the weights of the mean, g the gradient of the mean u and A the attention:

        dA = (g . v - g . u) / sum A,   dL = softmax'(dA),   dk = dL^T q,   dv = w^T g

    Where values are the keys themselves, the sum of dk and dv is one product, [dL; w]^T [q; g].
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _read(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, bias, keys, values, mask, _, ctx.joint_heads, ctx.eps = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(queries, keys, values, mask, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_updates, grad_attention = gradients
        queries, keys, values, mask, updates, attention = ctx.saved_tensors
        weights, total = mean_weights(attention, mask, ctx.eps)
        centred = _over_tokens(grad_updates, keys if values is None else values)
        centred = centred - (grad_updates * updates).sum(-1, keepdim=True)
        product = attention * (centred / total + grad_attention)
        axes = (1, 2) if ctx.joint_heads else (2,)
        grad_logits = product - attention * product.sum(axes, keepdim=True)
        grad_keys = grad_values = None
        if values is None and ctx.needs_input_grad[2]:
            left, right = torch.cat([grad_logits, weights], 2), torch.cat([queries, grad_updates], 2)
            grad_keys = _to_tokens(left, right, keys)
        elif values is not None:
            grad_keys = _to_tokens(grad_logits, queries, keys) if ctx.needs_input_grad[2] else None
            grad_values = _to_tokens(weights, grad_updates, values) if ctx.needs_input_grad[3] else None
        grad_bias = grad_logits.sum(-1) if ctx.has_bias else None
        return _from_tokens(grad_logits, keys), grad_bias, grad_keys, grad_values, None, None, None, None


def _read(
    queries: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    joint_heads: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    logits = _over_tokens(queries, keys)
    if bias is not None:
        logits = logits + bias[..., None]
    attention = softmax_over_slots(logits, mask, slot_mask, joint_heads=joint_heads)
    weights, _ = mean_weights(attention, mask, eps)
    return _from_tokens(weights, keys if values is None else values), attention


def _over_tokens(rows: Float[Tensor, "B H K E"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B H K N"]:
    """The product of every row with every token."""
    return (_grouped(rows, tokens) @ tokens.mT).to(rows.dtype).reshape(*rows.shape[:3], tokens.shape[2])


def _from_tokens(weights: Float[Tensor, "B H K N"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B H K E"]:
    """The sum of the tokens under each row of weights.

    A weight among 2**16 tokens is about 2**-16, where float16 has no more than a few bits; 2**6 times that is an
    ordinary number, and a mean of up to 2**10 still is one.
    """
    if tokens.dtype != torch.float16:
        sums = (_grouped(weights, tokens) @ tokens).to(weights.dtype)
    else:
        sums = (_grouped(weights * 64, tokens) @ tokens).to(weights.dtype) / 64
    return sums.reshape(*weights.shape[:3], tokens.shape[3])


def _to_tokens(
    weights: Float[Tensor, "B H K N"], rows: Float[Tensor, "B H K E"], tokens: Float[Tensor, "B G N E"]
) -> Float[Tensor, "B G N E"]:
    """For each token the sum of the rows under its column of weights, in the shape and dtype of `tokens`."""
    return _grouped(weights, tokens).mT @ _grouped(rows, tokens)


def _grouped(rows: Float[Tensor, "B H K X"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B G R X"]:
    """The rows that meet the same tokens beside one another, in the dtype of the tokens."""
    batch, heads, num_rows, width = rows.shape
    groups = tokens.shape[1]
    return rows.reshape(batch, groups, heads // groups * num_rows, width).to(tokens.dtype)


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(slot_attention_reference, "lines 7 and 8 of Algorithm 1, in float32 or better"),
        "mixed": Implementation(slot_attention_mixed, "products in the dtype of the keys, one grid kept for backward"),
    }
)
