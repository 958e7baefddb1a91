"""What implementations of slot attention share: its softmaxes, the mean over the tokens, and what a layer learned."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.precision import accumulation_dtype


class Weights(NamedTuple):
    """What the update multiplies and adds, as `nn.Linear`, `nn.LayerNorm` and `nn.GRUCell` hold it; None is left out.

    Args:
        gain: of the LayerNorm of the tokens, `[D]`.
        shift: its bias.
        key: `[H E, D]`.
        key_bias: `[H E]`.
        value: `[H E, D]`.
        value_bias: `[H E]`.
        out: `[S, H E]`, the map after the heads.
        out_bias: `[S]`.
        input: of the recurrent cell, `[3 S, H E]`, or `[3 S, S]` after `out`.
        state: `[3 S, S]`.
        input_bias: `[3 S]`.
        state_bias: `[3 S]`.
        mlp_gain: of the LayerNorm of the MLP, `[S]`.
        mlp_shift: its bias.
        expand: `[M, S]`.
        expand_bias: `[M]`.
        contract: `[S, M]`.
        contract_bias: `[S]`.
        slot_gain: of the LayerNorm of the slots, `[S]`.
        slot_shift: its bias.
        query: `[H E, S]`.
        query_bias: `[H E]`.
        last_input: of the recurrent cell that takes in what the MLP makes, `[3 S, S]`; None where that is added.
        last_state: `[3 S, S]`.
        last_input_bias: `[3 S]`.
        last_state_bias: `[3 S]`.
    """

    gain: Tensor | None
    shift: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    out: Tensor | None
    out_bias: Tensor | None
    input: Tensor
    state: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    mlp_gain: Tensor | None
    mlp_shift: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    contract: Tensor
    contract_bias: Tensor | None
    slot_gain: Tensor | None
    slot_shift: Tensor | None
    query: Tensor
    query_bias: Tensor | None
    last_input: Tensor | None = None
    last_state: Tensor | None = None
    last_input_bias: Tensor | None = None
    last_state_bias: Tensor | None = None


class Settings(NamedTuple):
    """Numbers of a call.

    Args:
        iterations: T.
        heads: H.
        joint_heads: one softmax over slots and heads together.
        scale: of the logits.
        eps: added to the attention.
        mlp_eps: of the LayerNorm of the MLP.
        slot_eps: of the LayerNorm of the slots.
    """

    iterations: int
    heads: int
    joint_heads: bool
    scale: float
    eps: float
    mlp_eps: float
    slot_eps: float


class TwoWaySettings(NamedTuple):
    """Numbers of a call.

    Args:
        iterations: T.
        over_tokens: weights with which tokens read slots sum to 1 over the tokens, rather than over the slots.
        scale: of the logits with which slots read.
        token_scale: of those with which tokens read.
        eps: added to attention that is averaged over tokens.
        norm_eps: of the LayerNorm of the tokens, of both directions.
        mlp_eps: of the LayerNorm of the slots' MLP.
        slot_eps: of the LayerNorm of slots that read.
        read_eps: of the LayerNorm of slots that are read.
        token_mlp_eps: of the LayerNorm of the tokens' MLP.
    """

    iterations: int
    over_tokens: bool
    scale: float
    token_scale: float
    eps: float
    norm_eps: float
    mlp_eps: float
    slot_eps: float
    read_eps: float
    token_mlp_eps: float


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
    """For each token a softmax over the slots, in each head or over all heads together; 0 where either is masked.

    In float32 or better.
    """
    if slot_mask is not None:
        absent = ~slot_mask[:, None, :, None]
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
    dtype = accumulation_dtype(logits)
    if joint_heads:
        attention = logits.flatten(1, 2).softmax(1, dtype=dtype).view(logits.shape)
    else:
        attention = logits.softmax(2, dtype=dtype)
    if slot_mask is not None:
        attention = attention.masked_fill(absent, 0)  # pyright: ignore[reportPossiblyUnboundVariable]
    return attention if mask is None else attention.masked_fill(~mask[:, None, None], 0)


def mean_weights(
    attention: Float[Tensor, "B H K N"], mask: Bool[Tensor, "B N"] | None, eps: float
) -> tuple[Float[Tensor, "B H K N"], Float[Tensor, "B H K 1"]]:
    """`(attention + eps) / total` and the total over the real tokens; all 0 over `eps` where there are none."""
    weights = attention + (eps if mask is None else eps * mask[:, None, None].to(attention.dtype))
    total = weights.sum(-1, keepdim=True)
    if mask is not None:
        total = total.clamp_min(eps)
    return weights / total, total


def read(
    queries: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    joint_heads: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    logits = products(queries, keys)
    if bias is not None:
        logits = logits + bias[..., None]  # in float32, as the bias
    attention = softmax_over_slots(logits, mask, slot_mask, joint_heads=joint_heads)
    weights, _ = mean_weights(attention, mask, eps)
    return from_tokens(weights, keys if values is None else values, dtype), attention


def iterate_once(
    tokens: Tensor, slots: Tensor, w: Weights, mask: Tensor | None, slot_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Slots and attention after one iteration, in plain operations on standardised tokens and weights of one dtype."""
    low, heads = tokens.dtype, (settings.heads, -1)
    key, value = w.key.unflatten(0, heads), w.value.unflatten(0, heads)
    empty = tokens.new_ones(1) if tokens.shape[1] else tokens.new_zeros(1)
    some = (empty if mask is None else mask.any(1).to(low))[:, None, None, None]
    normed = F.layer_norm(slots.to(low), slots.shape[-1:], w.slot_gain, w.slot_shift, settings.slot_eps)
    queries = F.linear(normed, w.query, w.query_bias).unflatten(-1, heads).transpose(1, 2)
    readers = queries @ key
    bias = torch.zeros_like(readers[..., 0]) if w.shift is None else (readers * w.shift).sum(-1)
    if w.key_bias is not None:
        bias = bias + (queries * w.key_bias.unflatten(0, heads)[:, None]).sum(-1)
    readers = (readers if w.gain is None else readers * w.gain) * settings.scale
    options = settings.joint_heads, settings.eps
    means, attention = read(
        readers, bias.float() * settings.scale, tokens[:, None], None, mask, slot_mask, *options, low
    )
    means = means if w.gain is None else means * w.gain
    means = means if w.shift is None else means + w.shift * some
    values = means @ value.mT
    values = values if w.value_bias is None else values + w.value_bias.unflatten(0, heads)[:, None] * some
    values = values.transpose(1, 2).flatten(2)
    values = values if w.out is None else F.linear(values, w.out, w.out_bias)
    return update(values, slots.to(low), w, settings.mlp_eps).to(slots.dtype), attention


def update(updates: Tensor, state: Tensor, w: Weights, eps: float) -> Tensor:
    """The state after its cell has let in updates, and its MLP what it makes of that."""

    def cell(updates: Tensor, state: Tensor, *weights: Tensor | None) -> Tensor:
        return torch.gru_cell(updates.flatten(0, 1), state.flatten(0, 1), *weights).view_as(state)  # pyright: ignore[reportCallIssue, reportArgumentType]

    state = cell(updates, state, w.input, w.state, w.input_bias, w.state_bias)
    normed = F.layer_norm(state, state.shape[-1:], w.mlp_gain, w.mlp_shift, eps)
    made = F.linear(F.linear(normed, w.expand, w.expand_bias).relu(), w.contract, w.contract_bias)
    if w.last_input is None:
        return state + made
    return cell(made, state, w.last_input, w.last_state, w.last_input_bias, w.last_state_bias)


def products(rows: Float[Tensor, "B H K E"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B H K N"]:
    """The product of every row with every token, in the dtype of the tokens."""
    return (grouped(rows, tokens) @ tokens.mT).reshape(*rows.shape[:3], tokens.shape[2])


def from_tokens(
    weights: Float[Tensor, "B H K N"], tokens: Float[Tensor, "B G N E"], dtype: torch.dtype | None = None
) -> Float[Tensor, "B H K E"]:
    """The sum of the tokens under each row of weights, in `dtype`, or that of the weights if None.

    A weight among 2**16 tokens is about 2**-16, where float16 has no more than a few bits; 2**6 times that is an
    ordinary number, and a mean of up to 2**10 still is one.
    """
    if tokens.dtype != torch.float16:
        sums = grouped(weights, tokens) @ tokens
    else:
        sums = (grouped(weights * 64, tokens) @ tokens).to(weights.dtype) / 64
    return sums.to(weights.dtype if dtype is None else dtype).reshape(*weights.shape[:3], tokens.shape[3])


def grouped(rows: Float[Tensor, "B H K X"], tokens: Float[Tensor, "B G N E"]) -> Float[Tensor, "B G R X"]:
    """The rows that meet the same tokens beside one another, in the dtype of the tokens."""
    batch, heads, num_rows, width = rows.shape
    groups = tokens.shape[1]
    return rows.reshape(batch, groups, heads // groups * num_rows, width).to(tokens.dtype)


def gradients_of(
    formula: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the inputs that need one, from those of what `formula` gives, which can be differentiated again."""
    inputs = [None if x is None else x.view_as(x) for x in inputs]  # one may depend on another
    outputs = formula(*inputs)
    graded = [(x, grad) for x, grad in zip(outputs, gradients, strict=True) if x.requires_grad and grad is not None]
    asked = [x for x in inputs if x is not None and x.requires_grad]
    ends, starts = zip(*graded, strict=True)
    found = iter(torch.autograd.grad(ends, asked, starts, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
