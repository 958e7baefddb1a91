"""All iterations of slot attention on a GPU: two launches each, one that reads and one that updates the slots.

A program of the update takes 16 rows (a row is a slot of a sample) through Algorithm 1's lines 8 to 10 and then line 6
of the next iteration: means, values, recurrent cell, MLP, queries, readers. Each step is a product with a weight that
reads what the step before has written, by the same program, behind a barrier. No weight is multiplied with another, so
nothing is prepared. Backward runs the update again, in plain operations.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import Settings, Weights
from narrows.ops.slot_attention.triton import INTERPRETED, Read, _cast, aligned, on_device_of


@triton.jit
def _statistics(x, at, real, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and inverse deviation of each row, as LayerNorm takes them."""
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        some = real[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(x + at[:, None] + column[None, :], mask=some, other=0.0).to(tl.float32), 1)
    mean = total / width
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        some = real[:, None] & (column < width)[None, :]
        value = tl.load(x + at[:, None] + column[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(some, (value - mean[:, None]) * (value - mean[:, None]), 0.0), 1)
    return mean, 1 / tl.sqrt(total / width + eps)


@triton.jit
def _vector(bias, column, width, present):
    """A bias, 0 where there is none."""
    value = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=(column < width) & present, other=0.0).to(tl.float32)
    return value


@triton.jit
def _affine(value, gain, shift, shifted, column, width):
    """`value * gain + shift`, the shift only in rows that are `shifted`."""
    if gain is not None:
        value = value * tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        value += _vector(shift, column, width, True)[None, :] * shifted[:, None]
    return value


@triton.jit
def _multiply(left, right, accumulator):
    """`accumulator + left @ right` of tiles of one dtype."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def _product(
    x, at, real, weight, column, columns, inner, stride_column, stride_inner, accumulator,
    mean, inverse, gain, shift, shifted, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x, `(x - mean) * inverse * gain + shift`, times some columns of a weight."""
    for start in range(0, inner, BLOCK):
        place = start + tl.arange(0, BLOCK)
        some = real[:, None] & (place < inner)[None, :]
        value = tl.load(x + at[:, None] + place[None, :], mask=some, other=0.0)
        if mean is not None:
            value = (value.to(tl.float32) - mean[:, None]) * inverse[:, None]
        if mean is not None or gain is not None or shift is not None:
            value = tl.where(some, _affine(value.to(tl.float32), gain, shift, shifted, place, inner), 0.0)
        offsets = column[None, :] * stride_column + place[:, None] * stride_inner
        tile = tl.load(weight + offsets, mask=(column < columns)[None, :] & (place < inner)[:, None], other=0.0)
        accumulator = _multiply(_cast(value, dtype), _cast(tile, dtype), accumulator)
    return accumulator


@triton.jit
def _update(
    sums, totals, means, total, slots, new, states, values, outs, hidden, queries, readers, bias,
    gain, shift, key, key_bias, value, value_bias, out, out_bias, input, state, input_bias, state_bias,
    mlp_gain, mlp_shift, expand, expand_bias, contract, contract_bias, slot_gain, slot_shift, query, query_bias,
    rows, K, H, chunks, D, W, S, E, M, U, scale, eps, mlp_eps, slot_eps,
    HAS_READ: tl.constexpr, READS_ON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`new` slots from what `slots` have read, if they have; readers and bias of the next read, if there is one."""
    dtype: tl.constexpr = readers.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    sample, slot, row = (row // K).to(tl.int64), row % K, row.to(tl.int64)
    always = real.to(tl.float32)
    if HAS_READ:
        whole = always * 0
        for h in range(H):  # what was read, over all chunks
            place = sample * chunks * H * K + h * K + slot
            whole = always * 0
            for c in range(chunks):
                whole += tl.load(totals + place + c * H * K, mask=real, other=0.0)
            whole = tl.where(real, whole, 1.0)
            at = (sample * H + h) * K + slot
            tl.store(total + at, tl.maximum(whole, eps), mask=real)
            for start in range(0, W, BLOCK_K):
                d = start + tl.arange(0, BLOCK_K)
                some = real[:, None] & (d < W)[None, :]
                mean = tl.zeros([ROWS, BLOCK_K], tl.float32)
                for c in range(chunks):
                    mean += tl.load(sums + (place + c * H * K)[:, None] * W + d[None, :], mask=some, other=0.0)
                tl.store(means + at[:, None] * W + d[None, :], mean / tl.maximum(whole, eps)[:, None], mask=some)
        any_token = (whole > 0).to(tl.float32) * always
        tl.debug_barrier()
        for h in range(H):  # line 8
            for start in range(0, E, BLOCK_C):
                e = start + tl.arange(0, BLOCK_C)
                accumulator = tl.zeros([ROWS, BLOCK_C], tl.float32)
                accumulator = _product(
                    means, ((sample * H + h) * K + slot) * W, real, value + h * E * D, e, E, D, D, 1, accumulator,
                    None, None, gain, shift, any_token, dtype, BLOCK_K,
                )  # fmt: skip
                inside = e < E
                if value_bias is not None:
                    accumulator += _vector(value_bias + h * E, e, E, inside)[None, :] * any_token[:, None]
                tl.store(
                    values + row[:, None] * H * E + (h * E + e)[None, :],
                    _cast(accumulator, dtype),
                    mask=real[:, None] & inside[None, :],
                )
        tl.debug_barrier()
        update = values
        if out is not None:
            for start in range(0, S, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                accumulator = tl.zeros([ROWS, BLOCK_C], tl.float32)
                accumulator = _product(
                    values, row * H * E, real, out, column, S, H * E, H * E, 1, accumulator,
                    None, None, None, None, None, dtype, BLOCK_K,
                )  # fmt: skip
                accumulator += _vector(out_bias, column, S, True)[None, :]
                tl.store(
                    outs + row[:, None] * S + column[None, :],
                    _cast(accumulator, dtype),
                    mask=real[:, None] & (column < S)[None, :],
                )
            tl.debug_barrier()
            update = outs
        for start in range(0, S, BLOCK_C):  # line 9
            column = start + tl.arange(0, BLOCK_C)
            inside = real[:, None] & (column < S)[None, :]
            gates = tl.zeros([ROWS, BLOCK_C], tl.float32)
            gates = _product(
                update, row * U, real, input, column, S, U, U, 1, gates, None, None, None, None, None, dtype, BLOCK_K
            )
            gates = _product(
                slots, row * S, real, state, column, S, S, S, 1, gates, None, None, None, None, None, dtype, BLOCK_K
            )
            gates += (_vector(input_bias, column, S, True) + _vector(state_bias, column, S, True))[None, :]
            reset = tl.sigmoid(gates)
            gates = tl.zeros([ROWS, BLOCK_C], tl.float32)
            gates = _product(
                slots,
                row * S,
                real,
                state + 2 * S * S,
                column,
                S,
                S,
                S,
                1,
                gates,
                None,
                None,
                None,
                None,
                None,
                dtype,
                BLOCK_K,
            )
            if state_bias is not None:
                gates += _vector(state_bias + 2 * S, column, S, True)[None, :]
            gates = _product(
                update, row * U, real, input + 2 * S * U, column, S, U, U, 1, reset * gates,
                None, None, None, None, None, dtype, BLOCK_K,
            )  # fmt: skip
            if input_bias is not None:
                gates += _vector(input_bias + 2 * S, column, S, True)[None, :]
            candidate = 2 * tl.sigmoid(2 * gates) - 1  # tanh
            gates = tl.zeros([ROWS, BLOCK_C], tl.float32)
            gates = _product(
                update,
                row * U,
                real,
                input + S * U,
                column,
                S,
                U,
                U,
                1,
                gates,
                None,
                None,
                None,
                None,
                None,
                dtype,
                BLOCK_K,
            )
            gates = _product(
                slots,
                row * S,
                real,
                state + S * S,
                column,
                S,
                S,
                S,
                1,
                gates,
                None,
                None,
                None,
                None,
                None,
                dtype,
                BLOCK_K,
            )
            if input_bias is not None:
                gates += _vector(input_bias + S, column, S, True)[None, :]
            if state_bias is not None:
                gates += _vector(state_bias + S, column, S, True)[None, :]
            keep = tl.sigmoid(gates)
            before = tl.load(slots + row[:, None] * S + column[None, :], mask=inside, other=0.0).to(tl.float32)
            after = candidate + keep * (before - candidate)
            tl.store(states + row[:, None] * S + column[None, :], _cast(after, states.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        average, inverse = _statistics(states, row * S, real, S, mlp_eps, ROWS, BLOCK_K)
        for start in range(0, M, BLOCK_C):  # line 10
            column = start + tl.arange(0, BLOCK_C)
            accumulator = tl.zeros([ROWS, BLOCK_C], tl.float32)
            accumulator = _product(
                states, row * S, real, expand, column, M, S, S, 1, accumulator,
                average, inverse, mlp_gain, mlp_shift, always, dtype, BLOCK_K,
            )  # fmt: skip
            accumulator = tl.maximum(accumulator + _vector(expand_bias, column, M, True)[None, :], 0.0)
            tl.store(
                hidden + row[:, None] * M + column[None, :],
                _cast(accumulator, dtype),
                mask=real[:, None] & (column < M)[None, :],
            )
        tl.debug_barrier()
        for start in range(0, S, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = real[:, None] & (column < S)[None, :]
            accumulator = tl.load(states + row[:, None] * S + column[None, :], mask=inside, other=0.0).to(tl.float32)
            accumulator += _vector(contract_bias, column, S, True)[None, :]
            accumulator = _product(
                hidden,
                row * M,
                real,
                contract,
                column,
                S,
                M,
                M,
                1,
                accumulator,
                None,
                None,
                None,
                None,
                None,
                dtype,
                BLOCK_K,
            )
            tl.store(new + row[:, None] * S + column[None, :], _cast(accumulator, new.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    if READS_ON:
        current = slots
        if HAS_READ:
            current = new
        average, inverse = _statistics(current, row * S, real, S, slot_eps, ROWS, BLOCK_K)
        for start in range(0, H * E, BLOCK_C):  # line 6
            column = start + tl.arange(0, BLOCK_C)
            accumulator = tl.zeros([ROWS, BLOCK_C], tl.float32)
            accumulator = _product(
                current, row * S, real, query, column, H * E, S, S, 1, accumulator,
                average, inverse, slot_gain, slot_shift, always, dtype, BLOCK_K,
            )  # fmt: skip
            accumulator += _vector(query_bias, column, H * E, True)[None, :]
            tl.store(
                queries + row[:, None] * H * E + column[None, :],
                _cast(accumulator, dtype),
                mask=real[:, None] & (column < H * E)[None, :],
            )
        tl.debug_barrier()
        for h in range(H):  # keys are not made: their map is applied to the queries
            at = (sample * H + h) * K + slot
            constant = always * 0
            for start in range(0, W, BLOCK_C):
                d = start + tl.arange(0, BLOCK_C)
                accumulator = tl.zeros([ROWS, BLOCK_C], tl.float32)
                accumulator = _product(
                    queries, row * H * E + h * E, real, key + h * E * D, d, D, E, 1, D, accumulator,
                    None, None, None, None, None, dtype, BLOCK_K,
                )  # fmt: skip
                accumulator *= scale
                constant += tl.sum(accumulator * _vector(shift, d, D, True)[None, :], 1)
                if gain is not None:
                    accumulator *= _vector(gain, d, D, True)[None, :]
                tl.store(
                    readers + at[:, None] * W + d[None, :],
                    _cast(accumulator, dtype),
                    mask=real[:, None] & (d < W)[None, :],
                )
            if key_bias is not None:
                for start in range(0, E, BLOCK_K):
                    e = start + tl.arange(0, BLOCK_K)
                    asked = tl.load(
                        queries + (row * H * E + h * E)[:, None] + e[None, :],
                        mask=real[:, None] & (e < E)[None, :],
                        other=0.0,
                    )
                    constant += scale * tl.sum(asked.to(tl.float32) * _vector(key_bias + h * E, e, E, True)[None, :], 1)
            tl.store(bias + at, constant, mask=real)


def tiling(dtype: torch.dtype) -> dict[str, int]:
    """How rows, columns and what is summed over are cut, for products in `dtype`; warps and stages."""
    inner = 16 if dtype == torch.float32 else 64
    return {"ROWS": 16, "BLOCK_C": 64, "BLOCK_K": inner, "num_warps": 8, "num_stages": 2}


@torch.library.custom_op("narrows::slot_iterations", mutates_args=())
@on_device_of
def _slot_iterations(
    tokens: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    present: list[bool],
    mask: Tensor | None,
    slot_mask: Tensor | None,
    iterations: int,
    heads: int,
    joint_heads: bool,
    scale: float,
    eps: float,
    mlp_eps: float,
    slot_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots after each iteration `[T, B, K, S]` and the last attention; readers, bias, means and totals of each."""
    batch, number, width = slots.shape
    given = _unpacked(weights, present)
    (inner, dim), hidden = given.key.shape, given.expand.shape[0]
    task = Read(aligned(tokens), mask, slot_mask, heads, number, joint_heads, eps)
    wide, low = task.tokens.shape[-1], tokens.dtype
    rows, constants = batch * number, tiling(low)
    new = slots.new_empty(iterations, batch, number, width)
    attention = slots.new_empty(batch, heads, number, tokens.shape[1])
    readers = tokens.new_empty(iterations, batch, heads, number, wide)
    bias = tokens.new_empty(iterations, batch, heads, number, dtype=torch.float32)
    means, totals = torch.empty_like(readers, dtype=torch.float32), torch.empty_like(bias)
    states, between = (
        slots.new_empty(rows, width),
        [slots.new_empty(rows, n, dtype=low) for n in (inner, width, hidden)],
    )
    queries = slots.new_empty(rows, inner, dtype=low)
    sums, parts, chunks = means, totals, 1
    for t in range(iterations + 1):
        if rows:
            at = max(t - 1, 0)  # of what has been read
            _update[(triton.cdiv(rows, constants["ROWS"]),)](
                sums, parts, means[at], totals[at], slots if t < 2 else new[t - 2], new[at], states, *between, queries,
                readers[min(t, iterations - 1)], bias[min(t, iterations - 1)], *given,
                rows, number, heads, chunks, dim, wide, width, inner // heads, hidden, given.input.shape[1],
                scale, eps, mlp_eps, slot_eps, HAS_READ=t > 0, READS_ON=t < iterations,
                **constants,
            )  # fmt: skip
        if t < iterations:
            last = t == iterations - 1
            sums, parts = task.forward(readers[t], bias[t], attention if last else None)
            chunks = sums.shape[1]
    return new, attention, readers[..., :dim].contiguous() if dim != wide else readers, bias, means, totals


@_slot_iterations.register_fake
def _(tokens: Tensor, slots: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    iterations, heads = options[4], options[5]
    batch, number, width = slots.shape
    dim = tokens.shape[2]
    new = slots.new_empty(iterations, batch, number, width)
    attention = slots.new_empty(batch, heads, number, tokens.shape[1])
    readers = tokens.new_empty(iterations, batch, heads, number, dim)
    bias = tokens.new_empty(iterations, batch, heads, number, dtype=torch.float32)
    means = tokens.new_empty(iterations, batch, heads, number, dim + -dim % 16, dtype=torch.float32)
    return new, attention, readers, bias, means, torch.empty_like(bias)


def _unpacked(weights: list[Tensor], present: list[bool]) -> Weights:
    rest = iter(weights)
    return Weights(*(next(rest) if there else None for there in present))  # pyright: ignore[reportArgumentType]


def _updated(
    means: Tensor, slots: Tensor, some: Tensor | None, weights: Weights, settings: Settings, low: torch.dtype
) -> Tensor:
    """Lines 8 to 10 of Algorithm 1 in plain operations; `some`, `[B, 1, 1, 1]`, is 1 for samples with a token."""
    cast = _cast_weights(weights, low)
    update = _values(means, some, weights, settings, low)
    cell = (cast.input, cast.state, cast.input_bias, cast.state_bias)
    state = torch.gru_cell(update.flatten(0, 1), slots.to(low).flatten(0, 1), *cell).view_as(slots)
    normed = F.layer_norm(state, state.shape[-1:], cast.mlp_gain, cast.mlp_shift, settings.mlp_eps)
    hidden = F.linear(normed, cast.expand, cast.expand_bias).relu()
    return (state + F.linear(hidden, cast.contract, cast.contract_bias)).to(slots.dtype)


def _cast_weights(weights: Weights, low: torch.dtype) -> Weights:
    return Weights(*(None if weight is None else weight.to(low) for weight in weights))


def _values(means: Tensor, some: Tensor | None, weights: Weights, settings: Settings, low: torch.dtype) -> Tensor:
    """Line 8: what the recurrent cell takes in, `[..., K, H E]`, or `[..., K, S]` after the map after the heads."""
    heads = settings.heads
    rows = means if weights.gain is None else means * weights.gain
    rows = rows if weights.shift is None else rows + (weights.shift if some is None else weights.shift * some)
    values = rows.to(low) @ weights.value.to(low).unflatten(0, (heads, -1)).mT
    if weights.value_bias is not None:
        constant = weights.value_bias.unflatten(0, (heads, 1, -1))
        values = values + (constant if some is None else constant * some).to(low)
    update = values.transpose(-2, -3).flatten(-2)
    if weights.out is None:
        return update
    return F.linear(update, weights.out.to(low), None if weights.out_bias is None else weights.out_bias.to(low))


class _Chain(NamedTuple):
    """What the gradients of slots and means need of all iterations T, computed for all of them at once.

    Args:
        weights: in the dtype of the products.
        settings: numbers of the call.
        keys: `[H, E, D]`, with gain and scale.
        constants: what the readers' bias is of the queries, `[H, 1, E]`.
        values: `[H, E, D]`, with gain.
        gates: how the new state moves with reset, update, candidate, and the state's part of the candidate,
            `[T, B, K, 4, S]`.
        back: from these four to the state before, `[4 S, S]`.
        keep: how it moves with the state before itself, `[T, B, K, S]`.
        positive: where the MLP's hidden layer is, `[T, B, K, M]`.
        after: the new state, and its mean and inverse deviation.
        before: the same of the state before.
    """

    weights: Weights
    settings: Settings
    keys: Tensor
    constants: Tensor
    values: Tensor
    gates: Tensor
    back: Tensor
    keep: Tensor
    positive: Tensor
    after: tuple[Tensor, Tensor, Tensor]
    before: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(
        cls,
        means: Tensor,
        slots: Tensor,
        some: Tensor | None,
        weights: Weights,
        settings: Settings,
        low: torch.dtype,
    ) -> "_Chain":
        """From the means and the slots before each iteration, `[T, B, ...]`."""
        cast, size = _cast_weights(weights, low), slots.shape[-1]
        update, slots = _values(means, some, weights, settings, low), slots.to(low)
        of_input = F.linear(update, cast.input, cast.input_bias).float().chunk(3, -1)
        of_state = F.linear(slots, cast.state, cast.state_bias).float().chunk(3, -1)
        reset, keep = (of_input[0] + of_state[0]).sigmoid(), (of_input[1] + of_state[1]).sigmoid()
        new = torch.tanh(of_input[2] + reset * of_state[2])
        moved = (1 - keep) * (1 - new * new)
        of_reset, of_keep = moved * of_state[2] * reset * (1 - reset), (slots - new) * keep * (1 - keep)
        gates = torch.stack([of_reset, of_keep, moved, moved * reset], -2)
        state = torch.lerp(new, slots.float(), keep).to(low)
        normed, *after = torch.native_layer_norm(state, [size], cast.mlp_gain, cast.mlp_shift, settings.mlp_eps)
        _, *before = torch.native_layer_norm(slots, [size], None, None, settings.slot_eps)
        zeros = cast.state.new_zeros(size, size)
        keys = cast.key.float() * settings.scale
        constants = keys.new_zeros(keys.shape[0]) if cast.shift is None else keys @ cast.shift.float()
        if cast.key_bias is not None:
            constants = constants + cast.key_bias * settings.scale
        heads = (settings.heads, -1)
        return cls(
            weights=cast,
            settings=settings,
            keys=(keys if cast.gain is None else keys * cast.gain).to(low).unflatten(0, heads),
            constants=constants.unflatten(0, heads)[:, None],
            values=(cast.value if cast.gain is None else cast.value * cast.gain).unflatten(0, heads),
            gates=gates,
            back=torch.cat([cast.state[: 2 * size], zeros, cast.state[2 * size :]]),
            keep=keep,
            positive=F.linear(normed, cast.expand, cast.expand_bias) > 0,
            after=(state, *after),
            before=(slots, *before),
        )

    def through_update(self, t: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the slots after iteration t to that of the slots before and of the means."""
        weights, low = self.weights, self.values.dtype
        hidden = (grad.to(low) @ weights.contract) * self.positive[t]
        grad = grad + _through_norm(hidden @ weights.expand, self.after, t, weights.mlp_gain)
        gates = (self.gates[t] * grad[..., None, :]).to(low).flatten(-2)
        update = gates[..., : weights.input.shape[0]] @ weights.input
        update = update if weights.out is None else update @ weights.out
        means = update.unflatten(-1, (self.settings.heads, -1)).transpose(1, 2) @ self.values
        return self.keep[t] * grad + gates @ self.back, means

    def through_readers(self, t: int, readers: Tensor, bias: Tensor) -> Tensor:
        """From the gradients of the readers and their bias to that of the slots they are made of."""
        queries = readers @ self.keys.mT + (bias[..., None] * self.constants).to(readers.dtype)
        normed = queries.transpose(1, 2).flatten(2) @ self.weights.query
        return _through_norm(normed, self.before, t, self.weights.slot_gain)


def _through_norm(grad: Tensor, normed: tuple[Tensor, Tensor, Tensor], t: int, gain: Tensor | None) -> Tensor:
    """The gradient of what a LayerNorm took in iteration t."""
    x, mean, inverse = (part[t] for part in normed)
    wanted = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, inverse, gain, None, wanted)[0]


def _readers(slots: Tensor, weights: Weights, settings: Settings, low: torch.dtype) -> tuple[Tensor, Tensor]:
    """Line 6, and the map of the keys applied to its queries: readers `[B, H, K, D]` and their bias, in float32."""
    cast = _cast_weights(weights, low)
    normed = F.layer_norm(slots.to(low), slots.shape[-1:], cast.slot_gain, cast.slot_shift, settings.slot_eps)
    queries = F.linear(normed, cast.query, cast.query_bias) * settings.scale
    queries = queries.unflatten(-1, (settings.heads, -1)).transpose(1, 2)
    readers = (queries @ cast.key.unflatten(0, (settings.heads, -1))).float()
    bias = readers.new_zeros(readers.shape[:3]) if weights.shift is None else readers @ weights.shift.to(readers.dtype)
    if cast.key_bias is not None:
        bias = bias + (queries * cast.key_bias.unflatten(0, (settings.heads, 1, -1))).sum(-1)
    return readers if weights.gain is None else readers * weights.gain, bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, slots, weights, ctx.present, mask, slot_mask, *numbers = inputs
    new, _, *read = output
    ctx.set_materialize_grads(False)
    ctx.settings = Settings(*numbers)
    ctx.save_for_backward(tokens, slots, mask, slot_mask, new, *read, *weights)


def _backward(ctx: Any, grad: Tensor | None, grad_attention: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tokens, slots, mask, slot_mask, new, readers, bias, means, totals, *given = ctx.saved_tensors
    settings, low = ctx.settings, tokens.dtype
    iterations, dim = readers.shape[0], readers.shape[-1]
    means = means[..., :dim]
    before = torch.cat([slots[None], new[:-1]])
    grad_slots = torch.zeros_like(slots, dtype=torch.float32) if grad is None else grad[-1].float()
    grad_attention = None if grad_attention is None else grad_attention.contiguous()
    some = None  # whether a sample has a token, where one may have none
    if mask is not None or tokens.shape[1] == 0:
        some = (totals[0, :, :1, :1] > settings.eps).to(low)[..., None]
        some = some if mask is None else mask.any(1)[:, None, None, None].to(low)
    weights = _unpacked([weight.detach() for weight in given], ctx.present)
    options = (mask, slot_mask, settings.joint_heads, settings.eps)
    of_new, of_means, centres, of_readers, of_bias = [], [], [], [], []
    chain = _Chain.of(means, before, some, weights, settings, low)
    for t in reversed(range(iterations)):  # of inputs, one iteration after the other
        of_new.insert(0, grad_slots)
        grad_state, grad_means = chain.through_update(t, grad_slots)
        of_means.insert(0, grad_means)
        centres.insert(0, (grad_means * means[t]).sum(-1))
        last = grad_attention if t == iterations - 1 else None
        rows = torch.ops.narrows.slot_read_backward_rows(
            tokens, readers[t], bias[t], *options, of_means[0], centres[0], totals[t], last
        )
        of_readers.insert(0, rows[0])
        of_bias.insert(0, rows[1])
        grad_slots = grad_state + chain.through_readers(t, *rows)
    with torch.enable_grad():  # of weights, all iterations together
        leaves = [weight.detach().requires_grad_() for weight in given]
        weights, rows = _unpacked(leaves, ctx.present), before.flatten(0, 1)
        some = None if some is None else some.repeat(iterations, 1, 1, 1)
        updated = _updated(means.flatten(0, 1), rows, some, weights, settings, low)
        asked = _readers(rows, weights, settings, low)
    outputs = (updated, *asked)
    collected = zip((of_new, of_readers, of_bias), outputs, strict=True)
    grad_outputs = [torch.cat(grads).to(output.dtype) for grads, output in collected]
    grads = torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True)
    grads = [None if one is None else one.contiguous() for one in grads]  # as the parameters lie
    grad_tokens = None
    if ctx.needs_input_grad[0]:
        grad_tokens = torch.ops.narrows.slot_read_backward_tokens(
            tokens, readers, bias, *options, torch.stack(of_means), torch.stack(centres), totals, grad_attention
        )
    return grad_tokens, grad_slots.to(slots.dtype), grads, *[None] * 10


_slot_iterations.register_autograd(_backward, setup_context=_keep)


def iterate(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: Weights,
    settings: Settings,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B H K N"]]:
    """The slots after all iterations, and the last attention, both in the dtype of the slots.

    Args:
        tokens: standardised, in the dtype in which products are computed.
        slots: the first ones.
        weights: in any dtype.
        settings: numbers of the call.
        mask: `[B, N]`, True at real tokens.
        slot_mask: `[B, K]`, True at real slots. What the others become has no meaning.
    """
    masks = (None if one is None else one.contiguous() for one in (mask, slot_mask))
    given = [weight.contiguous() for weight in weights if weight is not None]
    present = [weight is not None for weight in weights]
    new, attention, *_ = torch.ops.narrows.slot_iterations(
        tokens, slots.contiguous(), given, present, *masks, *settings
    )
    return new[-1], attention
