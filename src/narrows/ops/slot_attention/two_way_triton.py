"""Two-way slot attention on a GPU: one program updates the slots of a sample, one a tile of tokens.

Either walks through its recurrent cells and its MLP with its rows alone. What a product needs of all columns of the one
before goes through memory (the caches, that is: a program reads what it wrote itself, after a barrier), so that rows of
any width pass through tiles of one size, and tokens are read once and written once. Products are of the dtype of the
weights with sums in float32, on tensor cores.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.slot_attention.triton import (
    INTERPRETED,
    MOST_DIM,
    MOST_ROWS,
    Read,
    _against_all,
    _against_rows,
    _cast,
    _dot,
    _load,
    _rows_of_program,
    _softmax,
    _tokens_of_program,
    aligned,
)

TOKENS = 128  # in a tile, for at most 16 slots


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _vector(values, columns, width):
    """A tile of a vector in float32, 0 where there is none."""
    found = tl.zeros([columns.shape[0]], tl.float32)
    if values is not None:
        found += tl.load(values + columns, mask=columns < width, other=0.0).to(tl.float32)
    return found


@triton.jit
def _multiply(
    product, rows, row, real, stride, weight, outputs, width, num_outputs, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`product` and the product of rows, `width` wide, with the rows `outputs` of a weight `[num_outputs, width]`."""
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = _load(rows, row, k, real, width, stride)
        product += _against_rows(tile, _load(weight, outputs, k, outputs < num_outputs, width, width))
    return product


@triton.jit
def _statistics(rows, row, real, stride, width, eps, BLOCK_K: tl.constexpr):
    """Of each row the mean and the inverse of the standard deviation."""
    mean = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_K):
        mean += tl.sum(_load(rows, row, start + tl.arange(0, BLOCK_K), real, width, stride).to(tl.float32), 1)
    mean = mean / width
    square = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        centred = _load(rows, row, k, real, width, stride).to(tl.float32) - mean[:, None]
        square += tl.sum(tl.where((k < width)[None, :], centred * centred, 0.0), 1)
    return mean, tl.rsqrt(square / width + eps)


@triton.jit
def _norm_linear(
    rows, row, real, stride, width, gain, shift, eps, weight, bias, out, out_stride, num_outputs,
    RELU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = linear(norm(rows))`, or its ReLU."""
    mean, scale = _statistics(rows, row, real, stride, width, eps, BLOCK_K)
    for first in range(0, num_outputs, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        product = tl.zeros([row.shape[0], BLOCK_D], tl.float32) + _vector(bias, j, num_outputs)[None, :]
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tile = (_load(rows, row, k, real, width, stride).to(tl.float32) - mean[:, None]) * scale[:, None]
            if gain is not None:
                tile = tile * _vector(gain, k, width)[None, :]
            tile = tl.where((k < width)[None, :], tile + _vector(shift, k, width)[None, :], 0.0)
            weights = _load(weight, j, k, j < num_outputs, width, width)
            product += _against_rows(_cast(tile, weights.dtype), weights)
        if RELU:
            product = tl.maximum(product, 0.0)
        _store(out, row, j, real, num_outputs, out_stride, product)


@triton.jit
def _linear(
    rows, row, real, stride, width, weight, bias, out, out_stride, num_outputs,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = linear(rows)`."""
    for first in range(0, num_outputs, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        product = tl.zeros([row.shape[0], BLOCK_D], tl.float32) + _vector(bias, j, num_outputs)[None, :]
        product = _multiply(product, rows, row, real, stride, weight, j, width, num_outputs, BLOCK_K)
        _store(out, row, j, real, num_outputs, out_stride, product)


@triton.jit
def _store(out, row, columns, real, width, stride, values):
    offsets = row[:, None] * stride + columns[None, :]
    tl.store(out + offsets, _cast(values, out.dtype.element_ty), mask=real[:, None] & (columns < width)[None, :])


@triton.jit
def _gate(reset, keep, new, hidden, state):
    """The next state of a cell from its four sums."""
    new = 2.0 * _sigmoid(2.0 * (new + _sigmoid(reset) * hidden)) - 1.0  # tanh
    return new + _sigmoid(keep) * (state - new)


@triton.jit
def _cell(
    rows, stride, width, inputs, state, state_stride, dim, weight, bias, new_bias, out, out_stride, row, real,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = GRU(rows, state)`."""
    for first in range(0, dim, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        zeros = tl.zeros([row.shape[0], BLOCK_D], tl.float32)
        new = zeros + _vector(new_bias, j, dim)[None, :]
        reset, keep, hidden = _of_state(zeros, state, row, real, state_stride, weight, bias, j, dim, BLOCK_K)
        there = j < dim
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tile = _load(rows, row, k, real, width, stride)
            reset += _against_rows(tile, _load(inputs, j, k, there, width, width))
            keep += _against_rows(tile, _load(inputs + dim * width, j, k, there, width, width))
            new += _against_rows(tile, _load(inputs + 2 * dim * width, j, k, there, width, width))
        before = _load(state, row, j, real, dim, state_stride).to(tl.float32)
        _store(out, row, j, real, dim, out_stride, _gate(reset, keep, new, hidden, before))


@triton.jit
def _of_state(zeros, state, row, real, stride, weight, bias, j, dim, BLOCK_K: tl.constexpr):
    """What the state gives to reset, update and new."""
    there = j < dim
    reset, keep, hidden = zeros, zeros, zeros
    if bias is not None:
        reset += _vector(bias, j, dim)[None, :]
        keep += _vector(bias + dim, j, dim)[None, :]
        hidden += _vector(bias + 2 * dim, j, dim)[None, :]
    for start in range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = _load(state, row, k, real, dim, stride)
        reset += _against_rows(tile, _load(weight, j, k, there, dim, dim))
        keep += _against_rows(tile, _load(weight + dim * dim, j, k, there, dim, dim))
        hidden += _against_rows(tile, _load(weight + 2 * dim * dim, j, k, there, dim, dim))
    return reset, keep, hidden


@triton.jit
def _update_tokens(
    tokens, normalized, readers, reader_bias, gates, totals, mask, slot_mask,
    weight, bias, new_bias, norm_weight, norm_bias, expand, expand_bias,
    inputs, last_weight, last_bias, last_new_bias, state, expanded, out,
    N, D, K, M, tiles, scale, eps, mlp_eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of tokens reads the slots and passes cell, MLP and cell."""
    program = tl.program_id(0)
    b, first = (program // tiles).to(tl.int64), program % tiles * BLOCK_N
    lane, _, present = _rows_of_program(slot_mask, b, 1, K, ROWS, ROWS)
    row = tl.arange(0, BLOCK_N)
    here = first + row < N
    real = _tokens_of_program(mask, b, first + row, N, N)
    at = b * N + first
    tokens += at * D
    normalized += at * D
    state += at * D
    out += at * D
    expanded += at * M
    gates += b * K * 3 * D
    readers += b * K * D
    logits = _against_all(normalized, real, readers, lane, present, D, D, BLOCK_N, BLOCK_K)
    logits += tl.load(reader_bias + b * K + lane, mask=present, other=0.0).to(tl.float32)[None, :]
    read = _softmax(logits * scale, real, present, 1)
    if totals is not None:
        total = tl.load(totals + b * K + lane, mask=present, other=1.0)
        read = tl.where(real[:, None] & present[None, :], (read + eps) / total[None, :], 0.0)
    for start in range(0, D, BLOCK_D):
        j = start + tl.arange(0, BLOCK_D)
        zeros = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        reset, keep, hidden = _of_state(zeros, tokens, row, here, D, weight, bias, j, D, BLOCK_K)
        reset = _dot(read, _load(gates, lane, j, present, D, 3 * D), reset)
        keep = _dot(read, _load(gates + D, lane, j, present, D, 3 * D), keep)
        new = _dot(read, _load(gates + 2 * D, lane, j, present, D, 3 * D), zeros + _vector(new_bias, j, D)[None, :])
        before = _load(tokens, row, j, here, D, D).to(tl.float32)
        _store(state, row, j, here, D, D, _gate(reset, keep, new, hidden, before))
    tl.debug_barrier()
    _norm_linear(
        state, row, here, D, D, norm_weight, norm_bias, mlp_eps, expand, expand_bias, expanded, M, M,
        True, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    _cell(
        expanded, M, M, inputs, state, D, D, last_weight, last_bias, last_new_bias, out, D, row, here,
        BLOCK_D, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _gate_backward(
    of_state, of_input, new_bias, state, grad, sums, of_previous, R, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of new, reset, update and the state's part of new beside one another; and of the state by itself."""
    blocks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    real = first + row < R
    j = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    of_state += first * 3 * D
    of_input += first * 3 * D
    wide = 3 * D
    reset = _load(of_state, row, j, real, D, wide).to(tl.float32) + _load(of_input, row, j, real, D, wide)
    keep = _load(of_state + D, row, j, real, D, wide).to(tl.float32) + _load(of_input + D, row, j, real, D, wide)
    reset, keep = _sigmoid(reset), _sigmoid(keep)
    hidden = _load(of_state + 2 * D, row, j, real, D, wide).to(tl.float32)
    new = _load(of_input + 2 * D, row, j, real, D, wide) + _vector(new_bias, j, D)[None, :] + reset * hidden
    new = 2.0 * _sigmoid(2.0 * new) - 1.0
    before = _load(state + first * D, row, j, real, D, D).to(tl.float32)
    g = _load(grad + first * D, row, j, real, D, D).to(tl.float32)
    of_new = g * (1.0 - keep) * (1.0 - new * new)
    sums += first * 4 * D
    _store(sums, row, j, real, D, 4 * D, of_new)
    _store(sums + D, row, j, real, D, 4 * D, of_new * hidden * reset * (1.0 - reset))
    _store(sums + 2 * D, row, j, real, D, 4 * D, g * (before - new) * keep * (1.0 - keep))
    _store(sums + 3 * D, row, j, real, D, 4 * D, of_new * reset)
    _store(of_previous + first * D, row, j, real, D, D, g * keep)


@triton.jit
def _update_slots(
    means, seen, slots, value_gain, value_shift, to_v, to_v_bias,
    inputs, weight, bias, new_bias, norm_gain, norm_shift, expand, expand_bias, contract, contract_bias,
    last_inputs, last_weight, last_bias, last_new_bias,
    read_gain, read_shift, to_key, to_key_bias, to_query, to_query_bias, query_gain, query_shift,
    to_value, to_value_bias, gate_inputs,
    readers_gain, readers_shift, to_q, to_q_bias, to_k, to_k_bias,
    buffer, out, readers, reader_bias, next_readers, next_bias, gates,
    D, K, S, M, wide, read_scale, scale, mlp_eps, read_eps, readers_eps,
    UPDATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The slots of a sample take in what they have read, pass the MLP, and become readers of tokens and their gates."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    real = row < K
    slots += b * K * S
    out += b * K * S
    first = buffer + b * 3 * K * wide
    second = first + K * wide
    third = second + K * wide
    if UPDATE:
        there = tl.load(seen + b).to(tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mean = _load(means + b * K * D, row, k, real, D, D).to(tl.float32)
            if value_gain is not None:
                mean = mean * _vector(value_gain, k, D)[None, :]
            _store(first, row, k, real, D, wide, mean + there * _vector(value_shift, k, D)[None, :])
        tl.debug_barrier()
        for start in range(0, S, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            value = tl.zeros([ROWS, BLOCK_D], tl.float32) + there * _vector(to_v_bias, j, S)[None, :]
            value = _multiply(value, first, row, real, wide, to_v, j, D, S, BLOCK_K)
            _store(second, row, j, real, S, wide, value)
        tl.debug_barrier()
        _cell(second, wide, S, inputs, slots, S, S, weight, bias, new_bias, first, wide, row, real, BLOCK_D, BLOCK_K)
        tl.debug_barrier()
        _norm_linear(
            first, row, real, wide, S, norm_gain, norm_shift, mlp_eps, expand, expand_bias, third, wide, M,
            True, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        _linear(third, row, real, wide, M, contract, contract_bias, second, wide, S, BLOCK_D, BLOCK_K)
        tl.debug_barrier()
        _cell(
            second, wide, S, last_inputs, first, wide, S, last_weight, last_bias, last_new_bias, out, S, row, real,
            BLOCK_D, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        _norm_linear(
            out, row, real, S, S, read_gain, read_shift, read_eps, to_key, to_key_bias, first, wide, D,
            False, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        _norm_linear(
            out, row, real, S, S, read_gain, read_shift, read_eps, to_value, to_value_bias, second, wide, D,
            False, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        _readers(
            first, wide, D, to_query, to_query_bias, query_gain, query_shift, readers + b * K * D, reader_bias + b * K,
            D, read_scale, row, real, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        _linear(second, row, real, wide, D, gate_inputs, None, gates + b * K * 3 * D, 3 * D, 3 * D, BLOCK_D, BLOCK_K)
        tl.debug_barrier()
    else:
        for start in range(0, S, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            _store(out, row, k, real, S, S, _load(slots, row, k, real, S, S).to(tl.float32))
        tl.debug_barrier()
    _norm_linear(
        out, row, real, S, S, readers_gain, readers_shift, readers_eps, to_q, to_q_bias, third, wide, S,
        False, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    _readers(
        third, wide, S, to_k, to_k_bias, value_gain, value_shift, next_readers + b * K * D, next_bias + b * K,
        D, scale, row, real, BLOCK_D, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _readers(
    rows, stride, width, weight, bias, gain, shift, readers, reader_bias, D, scale, row, real,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows, `width` wide, behind the transposed map `weight [width, D]` of normalised tokens; and what biases add."""
    added = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        added += tl.sum(_load(rows, row, k, real, width, stride).to(tl.float32) * _vector(bias, k, width)[None, :], 1)
    for first in range(0, D, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        product = tl.zeros([row.shape[0], BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            weights = _load(weight, k, j, k < width, D, D)
            product += _against_rows(_load(rows, row, k, real, width, stride), tl.trans(weights))
        added += tl.sum(product * _vector(shift, j, D)[None, :], 1)
        if gain is not None:
            product = product * _vector(gain, j, D)[None, :]
        _store(readers, row, j, real, D, D, product * scale)
    tl.store(reader_bias + row, added * scale, mask=real)


def why_not(tokens: Tensor, slots: int, slot_dim: int, dim: int, mlp_dims: Sequence[int]) -> str | None:
    """The reason why the kernels cannot take these tokens and slots, or None where they can."""
    if tokens.device.type != ("cpu" if INTERPRETED.value else "cuda"):
        return f"tokens are on {tokens.device.type}, not on a CUDA device"
    widths = (dim, slot_dim, *mlp_dims)
    if slots > MOST_ROWS or max(widths) > MOST_DIM:
        return f"it takes {MOST_ROWS} slots and widths of {MOST_DIM} at most, not {slots} slots and widths {widths}"
    return None


def tiling(rows: int, *widths: int) -> dict[str, int]:
    """How a program with so many rows of tokens or slots cuts columns, and how many warps it takes."""
    width = max(16, triton.next_power_of_2(max(widths)))
    inner, warps = 64 if rows == 16 else 32, 4 if rows == 16 else 8
    return {"BLOCK_D": min(width, 32), "BLOCK_K": min(width, inner), "num_warps": warps, "num_stages": 2}


@torch.library.custom_op("narrows::update_tokens", mutates_args=())
def update_tokens(
    tokens: Tensor,
    normalized: Tensor,
    readers: Tensor,
    reader_bias: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    weights: Sequence[Tensor | None],
    scale: float,
    over_tokens: bool,
    eps: float,
    mlp_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, their state between the cells, and what the MLP expands; `weights` as in `TokenUpdate`, flat."""
    batch, num_tokens, dim = tokens.shape
    slots, hidden = readers.shape[1], weights[5].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
    tokens, normalized, readers, gates = (x.contiguous() for x in (tokens, normalized, readers, gates))
    bias = reader_bias.float().contiguous()
    mask, slot_mask = (None if x is None else x.contiguous() for x in (mask, slot_mask))
    weights = [None if x is None else x.contiguous() for x in weights]
    out, state = torch.empty_like(tokens), torch.empty_like(tokens)
    expanded = tokens.new_empty(batch, num_tokens, hidden)
    if not out.numel():
        return out, state, expanded
    totals = None
    if over_tokens:
        task = Read(aligned(normalized), mask, slot_mask, 1, slots, False, eps)
        scaled = (readers, bias) if scale == 1 else (readers * scale, bias * scale)
        if dim < task.tokens.shape[-1]:
            scaled = torch.nn.functional.pad(scaled[0], (0, task.tokens.shape[-1] - dim)), scaled[1]
        totals = task.forward(*scaled, None)[1].sum(1)
        totals = totals if mask is None else totals.clamp_min(eps)
    rows = max(16, triton.next_power_of_2(slots))
    tile = 64 if rows > 16 else TOKENS
    tiles = triton.cdiv(num_tokens, tile)
    _update_tokens[(batch * tiles,)](
        tokens, normalized, readers, bias, gates, totals, mask, slot_mask, *weights[:7], *weights[9:],
        state, expanded, out, num_tokens, dim, slots, hidden, tiles, scale, eps, mlp_eps,
        ROWS=rows, BLOCK_N=tile, **tiling(tile, dim, hidden),
    )  # fmt: skip
    return out, state, expanded


@update_tokens.register_fake
def _(tokens: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    hidden = others[6][5].shape[0]  # type: ignore[index]
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape), tokens.new_empty(*tokens.shape[:2], hidden)


@torch.library.custom_op("narrows::gate_backward", mutates_args=())
def gate_backward(
    of_state: Tensor, of_input: Tensor, new_bias: Tensor | None, state: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """`[..., 4 * D]` and `[..., D]`, of a cell whose state and input gave the products `[..., 3 * D]`."""
    of_state, of_input, state, grad = (x.contiguous() for x in (of_state, of_input, state, grad))
    dim, rows = grad.shape[-1], grad.shape[:-1].numel()
    sums, of_previous = grad.new_empty(*grad.shape[:-1], 4 * dim), torch.empty_like(grad)
    if grad.numel():
        width = min(256, triton.next_power_of_2(dim))
        _gate_backward[(triton.cdiv(rows, 8) * triton.cdiv(dim, width),)](
            of_state, of_input, new_bias, state, grad, sums, of_previous, rows, dim, BLOCK_R=8, BLOCK_D=width
        )
    return sums, of_previous


@gate_backward.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *shape, dim = inputs[-1].shape
    return inputs[-1].new_empty(*shape, 4 * dim), inputs[-1].new_empty(*shape, dim)


@torch.library.custom_op("narrows::update_slots", mutates_args=())
def update_slots(
    means: Tensor | None,
    seen: Tensor | None,
    slots: Tensor,
    weights: Sequence[Tensor | None],
    scales: Sequence[float],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The slots, readers and gates of the tokens, and the next readers; `weights` as in `SlotUpdate`."""
    sizes = _sizes(slots, weights)
    out, *others = (slots.new_empty(size, dtype=kind) for size, kind in sizes)
    batch, num_slots, slot_dim = slots.shape
    dim, hidden = sizes[1][0][-1], weights[10].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
    wide = triton.cdiv(max(dim, slot_dim, hidden), 16) * 16
    buffer = slots.new_empty(batch, 3, num_slots, wide)
    rows = max(16, triton.next_power_of_2(num_slots))
    weights = [None if x is None else x.contiguous() for x in weights]
    if means is not None:
        means = means.contiguous()
        seen = means.new_ones(batch) if seen is None else seen.to(means.dtype)
    if out.numel():
        _update_slots[(batch,)](
            means, seen, slots.contiguous(), *weights, buffer, out, *others,
            dim, num_slots, slot_dim, hidden, wide, *scales, *eps,
            UPDATE=means is not None, ROWS=rows, **tiling(rows, dim, slot_dim, hidden),
        )  # fmt: skip
    return out, *others  # pyright: ignore[reportReturnType]


@update_slots.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs[2].new_empty(size, dtype=kind) for size, kind in _sizes(*inputs[2:4]))


def _sizes(slots: Tensor, weights: Sequence[Tensor | None]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the slots, readers and their bias, the next readers and theirs, gates."""
    batch, num_slots, _ = slots.shape
    dim = weights[2].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    readers = [((batch, num_slots, dim), slots.dtype), ((batch, num_slots), torch.float32)]
    return [(tuple(slots.shape), slots.dtype), *readers, *readers, ((batch, num_slots, 3 * dim), slots.dtype)]


@register_flop_formula(torch.ops.narrows.update_tokens)
def _flops_of_tokens(tokens: torch.Size, _: torch.Size, readers: torch.Size, *others: Any, **__: Any) -> int:
    """Each token times readers, gates and matrices; with weights over the tokens, one read by the slots before."""
    matrices = sum(size.numel() for size in others[4] if size is not None and len(size) == 2)
    reads = 4 + 2 * others[6]
    return 2 * tokens[:2].numel() * (reads * readers[1:].numel() + matrices)


@register_flop_formula(torch.ops.narrows.gate_backward)
def _flops_of_gates(*_: Any, **__: Any) -> int:
    """Nothing is multiplied but numbers."""
    return 0


@register_flop_formula(torch.ops.narrows.update_slots)
def _flops_of_slots(
    means: torch.Size | None, _: Any, slots: torch.Size, weights: list[Any], *__: Any, **___: Any
) -> int:
    """Each slot times each matrix, before the first read only times those that readers are made of."""
    used = weights if means is not None else weights[-4:]
    return 2 * slots[:2].numel() * sum(size.numel() for size in used if size is not None and len(size) == 2)
