"""Two-way slot attention, written out."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import cast, compete, gru, layer_norm, mean_weights, mlp, working_dtype
from narrows.ops.two_way_slot_attention.common import Exchange, TwoWaySlotAttentionWeights, token_shares
from narrows.precision import autocast_off


def two_way_slot_attention_reference(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: TwoWaySlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None,
    *,
    num_iterations: int,
    token_normalization: str,
    eps: float,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B K N"]]:
    """Slots read tokens, then tokens read slots, each through a gate and followed by a gated MLP; T times."""
    with autocast_off(tokens):
        dtype = working_dtype(tokens, slots)
        weights = cast(weights, dtype)
        current, inputs = slots.to(dtype), tokens.to(dtype)
        if mask is not None:
            inputs = inputs.masked_fill(~mask[..., None], 0)
        inputs = layer_norm(inputs, weights.norm_tokens)
        for _ in range(num_iterations):
            logits, values = _project(current, inputs, weights.slots)  # [B, K, N], [B, N, S]
            attention = compete(logits[:, None], mask)
            shares, _ = mean_weights(attention, mask, eps)
            current = _update(current, shares.squeeze(1) @ values, weights.slots)

            logits, values = _project(inputs, current, weights.tokens)  # [B, N, K], [B, K, D]
            shares = token_shares(logits.mT, mask, token_normalization, eps)
            inputs = _update(inputs, shares.mT @ values, weights.tokens)
        if mask is not None:
            inputs = inputs.masked_fill(~mask[..., None], 0)
        attention = attention.squeeze(1).to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]
        return current.to(slots.dtype), inputs.to(tokens.dtype), attention


def _project(
    readers: Float[Tensor, "B R d"], read: Float[Tensor, "B C e"], exchange: Exchange
) -> tuple[Float[Tensor, "B R C"], Float[Tensor, "B C d"]]:
    read = layer_norm(read, exchange.norm_read)
    queries = F.linear(layer_norm(readers, exchange.norm_readers), *exchange.query)
    logits = queries @ F.linear(read, *exchange.key).mT * queries.shape[-1] ** -0.5
    return logits, F.linear(read, *exchange.value)


def _update(
    readers: Float[Tensor, "B R d"], updates: Float[Tensor, "B R d"], exchange: Exchange
) -> Float[Tensor, "B R d"]:
    readers = gru(updates, readers, exchange.gru)
    return gru(mlp(readers, exchange.mlp), readers, exchange.mlp_gru)
