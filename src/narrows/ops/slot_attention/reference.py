"""Slot attention as the paper writes it."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import (
    SlotAttentionWeights,
    cast,
    compete,
    gru,
    layer_norm,
    mean_weights,
    mlp,
    working_dtype,
)
from narrows.precision import autocast_off


def slot_attention_reference(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: SlotAttentionWeights,
    mask: Bool[Tensor, "B N"] | None,
    *,
    num_iterations: int,
    heads: int,
    joint_heads: bool,
    eps: float,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B H K N"]]:
    """Algorithm 1 of Locatello et al., line by line, in float32 or float64; heads as in its follow-ups."""
    with autocast_off(tokens):
        dtype = working_dtype(tokens, slots)
        inputs, current, weights = tokens.to(dtype), slots.to(dtype), cast(weights, dtype)
        if mask is not None:
            inputs = inputs.masked_fill(~mask[..., None], 0)

        def project(x: Tensor, name: str) -> Tensor:
            return F.linear(x, *getattr(weights, name)).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, rows, E]

        inputs = layer_norm(inputs, weights.norm_tokens)  # line 3
        keys, values = project(inputs, "key"), project(inputs, "value")
        for _ in range(num_iterations):  # line 4
            previous = current  # line 5
            queries = project(layer_norm(current, weights.norm_slots), "query")  # line 6
            logits = queries @ keys.mT * queries.shape[-1] ** -0.5
            attention = compete(logits, mask, joint_heads=joint_heads)  # line 7
            shares, _ = mean_weights(attention, mask, eps)
            updates = (shares @ values).transpose(1, 2).flatten(2)  # line 8, [B, K, H*E]
            if weights.output is not None:
                updates = F.linear(updates, *weights.output)
            current = gru(updates, previous, weights.gru)  # line 9
            current = current + mlp(current, weights.mlp)  # line 10
        return current.to(slots.dtype), attention.to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]
