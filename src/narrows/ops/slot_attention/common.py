"""What the implementations of slot attention, one-way and two-way, use unchanged: weights, precision, slot updates."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class Affine(NamedTuple):
    """Weight and bias of a linear map (`[out, in]`, `[out]`) or of a LayerNorm (`[D]`, `[D]`)."""

    weight: Tensor
    bias: Tensor | None


class GRU(NamedTuple):
    """A gated recurrent cell; gates in the order reset, update, new, as in `torch.nn.GRUCell`."""

    input: Affine
    hidden: Affine


class MLP(NamedTuple):
    """LayerNorm, linear, ReLU, linear."""

    norm: Affine
    expand: Affine
    contract: Affine


class SlotAttentionWeights(NamedTuple):
    """All learned tensors of slot attention: N tokens of width D, slots of width S, H heads of width E.

    Args:
        norm_tokens: LayerNorm of the tokens, `[D]`.
        norm_slots: LayerNorm of the slots, `[S]`.
        query: `[H*E, S]`.
        key: `[H*E, D]`.
        value: `[H*E, D]`.
        output: maps the concatenated heads to the slot width, `[S, H*E]`; None leaves them as they are.
        gru: its input is what a slot read, its state the slot.
        mlp: the residual MLP after it.
    """

    norm_tokens: Affine
    norm_slots: Affine
    query: Affine
    key: Affine
    value: Affine
    output: Affine | None
    gru: GRU
    mlp: MLP


def working_dtype(tokens: Tensor, slots: Tensor) -> torch.dtype:
    """float32, or float64 where tokens or slots are: what references and everything on the side of the slots use."""
    return torch.promote_types(torch.promote_types(tokens.dtype, slots.dtype), torch.float32)


def token_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype in which the N tokens are kept and multiplied: autocast's where it is on, their own otherwise."""
    device = tokens.device.type
    if torch.is_autocast_enabled(device) and tokens.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tokens.dtype


def cast(weights: Any, dtype: torch.dtype) -> Any:
    """A NamedTuple of tensors, nested as it may be, with every tensor in `dtype`."""
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        return weights.to(dtype)
    return type(weights)(*(cast(weight, dtype) for weight in weights))


def layer_norm(x: Float[Tensor, "*batch D"], norm: Affine) -> Float[Tensor, "*batch D"]:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, x.shape[-1:], *norm)


def absorb_bias(linear: Affine, norm: Affine) -> Float[Tensor, "out"]:
    """What a linear map after a LayerNorm adds to it: its image of the norm's bias, and its own bias."""
    assert norm.bias is not None
    image = linear.weight @ norm.bias
    return image if linear.bias is None else image + linear.bias


def gru(updates: Float[Tensor, "*batch I"], state: Float[Tensor, "*batch S"], cell: GRU) -> Float[Tensor, "*batch S"]:
    """One step of the recurrent cell for every row."""
    rows = updates.reshape(-1, updates.shape[-1]), state.reshape(-1, state.shape[-1])
    new = torch.gru_cell(*rows, cell.input.weight, cell.hidden.weight, cell.input.bias, cell.hidden.bias)
    return new.view(state.shape)


def mlp(x: Float[Tensor, "*batch D"], weights: MLP) -> Float[Tensor, "*batch D"]:
    """LayerNorm, linear, ReLU, linear."""
    return F.linear(F.linear(layer_norm(x, weights.norm), *weights.expand).relu(), *weights.contract)


def compete(
    logits: Float[Tensor, "B H K N"], mask: Bool[Tensor, "B N"] | None, *, joint_heads: bool = False
) -> Float[Tensor, "B H K N"]:
    """Softmax over the slots for each token, in each head or over all heads together; 0 at masked tokens."""
    attention = logits.flatten(1, 2).softmax(1).view(logits.shape) if joint_heads else logits.softmax(2)
    return attention if mask is None else attention.masked_fill(~mask[:, None, None], 0)


def mean_weights(
    attention: Float[Tensor, "B H K N"], mask: Bool[Tensor, "B N"] | None, eps: float
) -> tuple[Float[Tensor, "B H K N"], Float[Tensor, "B H K 1"]]:
    """`(attention + eps) / total` and the total over the real tokens; all 0 over `eps` where there are none.

    In float32 or better, where `eps` keeps a slot that won nothing from dividing by zero: it reads the plain mean.
    """
    weights = attention + (eps if mask is None else eps * mask[:, None, None].to(attention.dtype))
    total = weights.sum(-1, keepdim=True).clamp_min(eps)
    return weights / total, total
