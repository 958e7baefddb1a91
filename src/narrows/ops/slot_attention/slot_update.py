"""What slots of the two-way form make of the tokens they read, and what tokens need to read them, in one step."""

from itertools import compress
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.token_update import Cell, step
from narrows.precision import autocast_off, is_transformed


class SlotUpdate(NamedTuple):
    """The weights with which slots read tokens, update themselves and are read, all in one dtype.

    LayerNorms have a gain and a shift, linear maps a bias, cells the three of `Cell`; any of these may be None but the
    cells' weights.
    """

    value_gain: Tensor | None  # of the LayerNorm of tokens that slots read, [D]
    value_shift: Tensor | None
    to_v: Tensor  # [S, D]
    to_v_bias: Tensor | None
    inputs: Tensor  # the first cell's map of its input, [3 * S, S]
    weight: Tensor
    bias: Tensor | None
    new_bias: Tensor | None
    norm_gain: Tensor | None  # of the MLP's LayerNorm, [S]
    norm_shift: Tensor | None
    expand: Tensor  # [M, S]
    expand_bias: Tensor | None
    contract: Tensor  # [S, M]
    contract_bias: Tensor | None
    last_inputs: Tensor  # the second cell's
    last_weight: Tensor
    last_bias: Tensor | None
    last_new_bias: Tensor | None
    read_gain: Tensor | None  # of the LayerNorm of slots that tokens read, [S]
    read_shift: Tensor | None
    to_key: Tensor  # [D, S]
    to_key_bias: Tensor | None
    to_query: Tensor  # of tokens, [D, D]
    to_query_bias: Tensor | None
    query_gain: Tensor | None  # of the LayerNorm of tokens that read, [D]
    query_shift: Tensor | None
    to_value: Tensor  # [D, S]
    to_value_bias: Tensor | None
    gate_inputs: Tensor  # the tokens' first cell's map of its input, [3 * D, D]
    readers_gain: Tensor | None  # of the LayerNorm of slots that read, [S]
    readers_shift: Tensor | None
    to_q: Tensor  # of slots, [S, S]
    to_q_bias: Tensor | None
    to_k: Tensor  # of tokens, [S, D]
    to_k_bias: Tensor | None


class Updated(NamedTuple):
    """The slots, and what reads next.

    Args:
        slots: `[B, K, S]`.
        readers: with which normalised tokens read these slots, `[B, K, D]`, scaled; 0 before the first update.
        reader_bias: what is added to their logits, `[B, K]`.
        next_readers: with which these slots read normalised tokens, `[B, K, D]`, scaled.
        next_bias: what is added to theirs.
        gates: the slots' values after the map of the tokens' first cell, `[B, K, 3 * D]`.
    """

    slots: Tensor
    readers: Tensor
    reader_bias: Tensor
    next_readers: Tensor
    next_bias: Tensor
    gates: Tensor


def update_slots(
    means: Float[Tensor, "B K D"] | None,
    seen: Bool[Tensor, "B"] | None,
    slots: Float[Tensor, "B K S"],
    weights: SlotUpdate,
    scales: tuple[float, float],
    eps: tuple[float, float, float],
) -> Updated:
    """The slots after they have read `means`, by a kernel; its backward takes plain operations.

    Args:
        means: of the tokens, normalised without gain and shift; None for the first readers of slots as they are.
        seen: which samples have any token; all if None.
        slots: the cells' state.
        weights: of the slots and of what reads them.
        scales: of the logits with which tokens read and with which slots read.
        eps: of the LayerNorms of the MLP, of slots that are read and of slots that read.
    """
    inputs = (means, seen, slots, *weights)
    with autocast_off(slots):
        if is_transformed(*(x for x in inputs if x is not None)) or (
            torch.compiler.is_compiling() and torch.is_grad_enabled()
        ):
            return Updated(*_update(scales, eps, *inputs))
        return Updated(*_Update.apply(scales, eps, *inputs))  # pyright: ignore[reportGeneralTypeIssues]


def _update(scales: tuple[float, float], eps: tuple[float, float, float], *inputs: Any) -> tuple[Tensor, ...]:
    """The formula in plain operations."""
    means, seen, slots, *flat = inputs
    w, (mlp_eps, read_eps, readers_eps) = SlotUpdate(*flat), eps

    def behind(
        rows: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Any, Any], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Readers of normalised tokens from rows that meet their image under a linear map."""
        readers, (gain, shift) = rows @ weight, norm
        added = rows.new_zeros(rows.shape[:-1]) if bias is None else (rows * bias).sum(-1)
        added = added if shift is None else added + (readers * shift).sum(-1)
        return scale * (readers if gain is None else readers * gain), scale * added.float()

    nothing = slots.new_zeros(*slots.shape[:2], w.to_v.shape[1])
    readers, reader_bias, gates = nothing, nothing[..., 0].float(), nothing.repeat(1, 1, 3)
    if means is not None:
        there = slots.new_ones(1, 1, 1) if seen is None else seen.to(slots.dtype)[:, None, None]
        means = means if w.value_gain is None else means * w.value_gain
        means = means if w.value_shift is None else means + there * w.value_shift
        values = F.linear(means.to(slots.dtype), w.to_v)
        values = values if w.to_v_bias is None else values + there * w.to_v_bias
        slots = step(Cell(w.weight, w.bias, w.new_bias), values, w.inputs.mT, slots)
        hidden = F.linear(_norm(slots, w.norm_gain, w.norm_shift, mlp_eps), w.expand, w.expand_bias).relu()
        hidden = F.linear(hidden, w.contract, w.contract_bias)
        slots = step(Cell(w.last_weight, w.last_bias, w.last_new_bias), hidden, w.last_inputs.mT, slots)
        rows = _norm(slots, w.read_gain, w.read_shift, read_eps)
        keys, values = F.linear(rows, w.to_key, w.to_key_bias), F.linear(rows, w.to_value, w.to_value_bias)
        readers, reader_bias = behind(keys, w.to_query, w.to_query_bias, (w.query_gain, w.query_shift), scales[0])
        gates = F.linear(values, w.gate_inputs)
    queries = F.linear(_norm(slots, w.readers_gain, w.readers_shift, readers_eps), w.to_q, w.to_q_bias)
    next_readers, next_bias = behind(queries, w.to_k, w.to_k_bias, (w.value_gain, w.value_shift), scales[1])
    return slots, readers, reader_bias, next_readers, next_bias, gates


def _norm(rows: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:], gain, shift, eps)


class _Update(torch.autograd.Function):
    """Backward makes all of it again: slots are few."""

    @staticmethod
    def forward(
        ctx: Any, scales: tuple[float, float], eps: tuple[float, float, float], *inputs: Any
    ) -> tuple[Tensor, ...]:
        from narrows.ops.slot_attention import two_way_triton

        means, seen, slots, *flat = inputs
        ctx.scales, ctx.eps = scales, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return two_way_triton.update_slots(means, seen, slots, flat, scales, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        twice, needed = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # Fresh ones, since one may depend on another.
            fresh = [
                x if not need else x.view_as(x) if twice else x.detach().requires_grad_()
                for x, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = _update(ctx.scales, ctx.eps, *fresh)
        asked = [x for x, need in zip(fresh, needed, strict=True) if need]
        graded = [x.requires_grad and grad is not None for x, grad in zip(outputs, gradients, strict=True)]
        ends = list(compress(outputs, graded)), asked, list(compress(gradients, graded))
        found = iter(torch.autograd.grad(*ends, create_graph=twice, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)
