"""Slot attention on queries, keys and values: K slots compete for N tokens, each reads a mean of what it wins."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.ops.dispatch import TRITON_INSTALLED, Implementation, why_no_kernels
from narrows.ops.slot_attention import mixed, reference
from narrows.ops.slot_attention.common import Settings, TwoWaySettings, Weights, token_weights
from narrows.precision import accumulation_dtype, autocast_off, is_transformed
from narrows.validation import check_choice, check_mask, check_tokens

TRANSFORMED = "it has no rule for torch.func or forward-mode differentiation"


def _run_kernels(
    queries: Float[Tensor, "B H K D"],
    bias: Float[Tensor, "B H K"] | None,
    keys: Float[Tensor, "B 1 N D"],
    _values: Float[Tensor, "B 1 N D"],
    mask: Bool[Tensor, "B N"] | None,
    slot_mask: Bool[Tensor, "B K"] | None,
    joint_heads: bool,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "B H K D"], Float[Tensor, "B H K N"]]:
    from narrows.ops.slot_attention.read import read

    means, attention = read(keys[:, 0], queries, bias, mask, slot_mask, joint_heads=joint_heads, eps=eps)
    assert attention is not None
    return means if dtype is None else means.to(dtype), attention


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(reference.slot_attention, "lines 7 and 8 of Algorithm 1, in float32 or better"),
        "mixed": Implementation(mixed.slot_attention, "products in the dtype of the keys, one grid kept for backward"),
        "triton": Implementation(
            _run_kernels, "kernels for CUDA: one pass over the tokens, no grid kept for backward", why_no_kernels
        ),
    }
)


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
    dtype: torch.dtype | None = None,
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
        dtype: of the means; float32, or float64 where an argument is, if None.
        impl: "reference" computes in float32 or better; "mixed" multiplies in the dtype of the keys, computes the
            softmax and all sums in float32 or better, and keeps for backward one `[B, H, K, N]`; "triton" does so in
            kernels that keep nothing of that size, for values that are the keys; a second derivative takes plain
            operations. "auto" takes "triton" for what it can read on a CUDA device, and "mixed" otherwise and under
            `torch.export`.

    Returns:
        The attention in float32, or in float64 where an argument is, and the means in `dtype`. A sample without any
        real token has read zeros.

    Raises:
        InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
        ImplementationUnavailable: `impl="triton"` where the kernels cannot run.

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
    if impl == "auto":
        on_gpu = keys.is_cuda and not torch.compiler.is_exporting()
        impl = "triton" if on_gpu and why_not_triton(queries, keys, values) is None else "mixed"
    elif impl == "triton" and (reason := why_no_kernels() or why_not_triton(queries, keys, values)) is not None:
        raise ImplementationUnavailable(
            f"slot_attention: impl='triton' cannot run here: {reason}. Use impl='auto', or see `narrows info`."
        )
    return SlotAttentionResult(
        *IMPLEMENTATIONS[impl].run(queries, bias, keys, values, mask, slot_mask, joint_heads, eps, dtype)
    )


def why_not_triton(
    queries: Float[Tensor, "B H K E"], keys: Float[Tensor, "B G N E"], values: Float[Tensor, "B G N V"]
) -> str | None:
    """The reason why the kernels cannot take these tensors, or None where they can. The machine is not asked."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if values is not keys or keys.shape[1] != 1:
        return "it reads values that are the keys, and the same for all heads"
    if is_transformed(queries, keys):
        return TRANSFORMED
    from narrows.ops.slot_attention import triton

    return triton.why_not(keys.device, keys.dtype, keys.shape[-1], queries.shape[1], queries.shape[2])


def why_not_iterate(
    tokens: Float[Tensor, "B N D"], slots: Float[Tensor, "B K S"], weights: Weights, dtype: torch.dtype, heads: int
) -> str | None:
    """The reason why `iterate` cannot take these, or None where it can. The machine is not asked."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if slots.shape[-1] > 1024:
        return "it takes slots 1024 wide at most"
    if is_transformed(tokens, slots, *(weight for weight in weights if weight is not None)):
        return TRANSFORMED
    from narrows.ops.slot_attention import triton

    return triton.why_not(tokens.device, dtype, tokens.shape[-1], heads, slots.shape[1])


def iterate(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: Weights,
    settings: Settings,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B H K N"]]:
    """Lines 4 to 10 of Algorithm 1 on a GPU: the slots after all iterations and the last attention, in their dtype.

    Args:
        tokens: standardised, in the dtype in which products are computed.
        slots: the first ones.
        weights: in any dtype.
        settings: numbers of the call.
        mask: `[B, N]`, True at real tokens.
        slot_mask: `[B, K]`, True at real slots. What the others become has no meaning.
    """
    from narrows.ops.slot_attention import iterations

    return iterations.iterate(tokens, slots, weights, settings, mask, slot_mask)


def why_not_two_way(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: tuple[Weights, Weights],
    dtype: torch.dtype,
) -> str | None:
    """The reason why `iterate_both` cannot take these, or None where it can. The machine is not asked."""
    widest = max(side.expand.shape[0] for side in weights)
    if widest > 1024:
        return f"it takes MLPs 1024 wide at most, not {widest}"
    given = (weight for side in weights for weight in side if weight is not None)
    return why_not_iterate(tokens, slots, weights[0], dtype, 1) or (TRANSFORMED if is_transformed(*given) else None)


def iterate_both(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: tuple[Weights, Weights],
    settings: TwoWaySettings,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B 1 K N"]]:
    """All iterations of two-way slot attention on a GPU: slots and tokens after them, and the slots' last attention.

    Args:
        tokens: in the dtype in which products are computed.
        slots: the first ones.
        weights: of the slots, which read tokens, and of the tokens, which read slots, in any dtype.
        settings: numbers of the call.
        mask: `[B, N]`, True at real tokens. What the others become has no meaning.
        slot_mask: `[B, K]`, True at real slots. What the others become has no meaning.
    """
    from narrows.ops.slot_attention import two_way

    return two_way.iterate(tokens, slots, weights, settings, mask, slot_mask)


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
        factor: float = keys.shape[-1] ** -0.5 if scale is None else scale
        keys, queries = keys.to(product_dtype), queries.to(product_dtype)
        logits = torch.baddbmm(keys.new_empty(1, 1, 1), keys, queries.mT, beta=0, alpha=factor)
        weights = token_weights(logits, mask, slot_mask, normalization=normalization, eps=eps)
        return weights.mT.to(product_dtype) @ values.to(product_dtype)
