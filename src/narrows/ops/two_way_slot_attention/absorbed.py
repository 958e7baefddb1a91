"""Two-way slot attention without projecting a token to query, key or value, nor what it reads."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import (
    GRU,
    Affine,
    absorb_bias,
    cast,
    gru,
    layer_norm,
    mlp,
    token_dtype,
    working_dtype,
)
from narrows.ops.slot_attention.read import read
from narrows.ops.two_way_slot_attention.common import Exchange, TwoWaySlotAttentionWeights, token_shares
from narrows.precision import autocast_off


def two_way_slot_attention_absorbed(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: TwoWaySlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None,
    *,
    num_iterations: int,
    token_normalization: str,
    eps: float,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B K N"]]:
    r"""The same numbers with less work for each token.

    - Queries, keys and values of tokens are absorbed as in one-way slot attention; both directions share one
      normalised copy of the tokens.
    - A token reads a weighted sum of K slots, so the gates' input product is taken of the K slots before the sum.
    - The second gates' input product absorbs the MLP's last map, where that is the smaller product.

    The slots live in float32 or float64; the tokens stay in the dtype they came in, or in autocast's.
    """
    low = token_dtype(tokens)
    with autocast_off(tokens):
        dtype = working_dtype(tokens, slots)
        current, weights = slots.to(dtype), cast(weights, dtype)
        own = cast(weights.tokens, low)
        contract, input_map = _second_input(weights.tokens, low)
        any_token = 1
        inputs = tokens
        if mask is not None:
            inputs = inputs.masked_fill(~mask[..., None], 0)
            any_token = mask.any(1)[:, None, None]
        inputs = layer_norm(inputs, cast(weights.norm_tokens, tokens.dtype)).to(low)
        for _ in range(num_iterations):
            tokens_hat = F.layer_norm(inputs, inputs.shape[-1:])
            updates, attention = _slots_read(current, tokens_hat, weights.slots, mask, any_token, eps)
            current = gru(updates, current, weights.slots.gru)
            current = gru(mlp(current, weights.slots.mlp), current, weights.slots.mlp_gru)

            shares, values = _tokens_read(current, tokens_hat, weights.tokens, mask, token_normalization, eps)
            inputs = _gate(shares.mT.to(low), values.to(low), inputs, own.gru)
            hidden = F.linear(layer_norm(inputs, own.mlp.norm), *own.mlp.expand).relu()
            hidden = hidden if contract is None else F.linear(hidden, *contract)
            inputs = _gate(hidden, input_map.weight.mT, inputs, GRU(input_map, own.mlp_gru.hidden))
        if mask is not None:
            inputs = inputs.masked_fill(~mask[..., None], 0)
        attention = attention.squeeze(1).to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]
        return current.to(slots.dtype), inputs.to(tokens.dtype), attention


def _slots_read(
    slots: Float[Tensor, "B K S"],
    tokens: Float[Tensor, "B N D"],
    exchange: Exchange,
    mask: Bool[Tensor, "B N"] | None,
    any_token: Tensor | int,
    eps: float,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B 1 K N"]]:
    norm = exchange.norm_read
    queries = F.linear(layer_norm(slots, exchange.norm_readers), *exchange.query) * slots.shape[-1] ** -0.5
    readers = (queries @ exchange.key.weight) * norm.weight
    offsets = queries @ absorb_bias(exchange.key, norm)
    mixed, attention = read(readers[:, None], offsets[:, None], tokens, mask, eps=eps)
    values = F.linear(mixed.squeeze(1) * norm.weight, exchange.value.weight)
    return values + absorb_bias(exchange.value, norm) * any_token, attention


def _tokens_read(
    slots: Float[Tensor, "B K S"],
    tokens: Float[Tensor, "B N D"],
    exchange: Exchange,
    mask: Bool[Tensor, "B N"] | None,
    normalization: str,
    eps: float,
) -> tuple[Float[Tensor, "B K N"], Float[Tensor, "B K G"]]:
    """What each token reads of each slot, and what the slots hold for the gates."""
    norm = exchange.norm_readers
    slots = layer_norm(slots, exchange.norm_read)
    keys = F.linear(slots, *exchange.key) * tokens.shape[-1] ** -0.5
    readers = (keys @ exchange.query.weight) * norm.weight
    products = readers.to(tokens.dtype) @ tokens.mT
    logits = products.to(slots.dtype) + (keys @ absorb_bias(exchange.query, norm))[..., None]
    values = F.linear(F.linear(slots, *exchange.value), exchange.gru.input.weight)
    return token_shares(logits, mask, normalization, eps), values


def _second_input(exchange: Exchange, low: torch.dtype) -> tuple[Affine | None, Affine]:
    """The MLP's last map and the second gates' map of its result: one after the other, or as one if that is less."""
    contract, inner = exchange.mlp.contract, exchange.mlp_gru.input
    width, hidden = contract.weight.shape
    if 2 * hidden >= 3 * width:  # D*M + 3*D*D <= 3*D*M
        return cast(contract, low), cast(inner, low)
    assert contract.bias is not None
    bias = F.linear(contract.bias, *inner)
    return None, cast(Affine(inner.weight @ contract.weight, bias), low)


def _gate(
    left: Float[Tensor, "B N R"], right: Float[Tensor, "*B R G"], state: Float[Tensor, "B N D"], cell: GRU
) -> Float[Tensor, "B N D"]:
    """One step of the recurrent cell whose input product is `left @ right`."""
    dim = state.shape[-1]
    (_, input_bias), (weight, bias) = cell
    assert input_bias is not None
    assert bias is not None
    both = _product(left, right[..., : 2 * dim]) + F.linear(state, weight[: 2 * dim], (input_bias + bias)[: 2 * dim])
    reset, keep = both.sigmoid().chunk(2, -1)
    new = _product(left, right[..., 2 * dim :]) + input_bias[2 * dim :]
    new = torch.tanh(new + reset * F.linear(state, weight[2 * dim :], bias[2 * dim :]))
    return torch.lerp(new, state, keep)


def _product(left: Float[Tensor, "B N R"], right: Float[Tensor, "*B R G"]) -> Float[Tensor, "B N G"]:
    """`left @ right`; the same `right` for every sample is a linear map."""
    return F.linear(left, right.mT) if right.ndim == 2 else left @ right
