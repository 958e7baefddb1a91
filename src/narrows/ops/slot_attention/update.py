"""Kernels that update slots with what they have read, and make of them what reads next; and the gradients of both.

A program takes 16 rows (a row is a slot of a sample) through Algorithm 1's lines 8 to 10 and then line 6 of the next
iteration: means, values, recurrent cell, MLP, queries, readers. Each step is a product with a weight that reads what
the step before has written, by the same program, behind a barrier. No weight is multiplied with another, so nothing is
prepared. Backward walks the same way back with what forward has kept. It writes down the rows whose products are the
gradients of matrices, and sums the gradients of vectors over its rows: the rest is one product for each matrix and one
sum for all vectors, of all iterations at once.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from narrows.ops.slot_attention.common import Weights
from narrows.ops.slot_attention.rows import ROWS
from narrows.ops.slot_attention.tiles import (
    _add_gates,
    _add_rows,
    _affine,
    _cast,
    _cell,
    _gradients_of_gates,
    _linear,
    _normalize,
    _normalize_backward,
    _product,
    _rows,
    _up,
    _vector,
    _write,
)


@triton.jit
def _ask(
    slots, row, real, S, eps, norm_gain, norm_shift, map, map_bias, normed, queries, kept,
    key, key_bias, gain, shift, readers, bias, place, K, H, E, D, W, scale,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Readers of normalised tokens and their bias: keys are not made, their map is applied to the queries."""
    always = real.to(tl.float32)
    _normalize(slots, row * S, real, S, eps, norm_gain, norm_shift, always, normed, kept, BLOCK_K)
    tl.debug_barrier()
    _linear(normed, kept, real, S, map, map_bias, always, queries, kept, H * E, 1, S, False, dtype, BLOCK_C, BLOCK_K)
    tl.debug_barrier()
    for h in range(H):
        at = place + h * K
        constant = always * 0
        for start in range(0, W, BLOCK_C):
            d = start + tl.arange(0, BLOCK_C)
            product = tl.zeros([row.shape[0], BLOCK_C], tl.float32)
            product = _product(queries + h * E, kept, real, E, key + h * E * D, d, D, D, 1, product, dtype, BLOCK_K)
            constant += tl.sum(product * _vector(shift, d, D)[None, :], 1)
            _write(readers, at * W, real, d, W, scale * _affine(product, gain, None, always, d, D))
        if key_bias is not None:
            for start in range(0, E, BLOCK_K):
                e = start + tl.arange(0, BLOCK_K)
                part = _vector(key_bias, e, E, h * E)
                constant += tl.sum(_rows(queries + h * E, kept, real, e, E) * part[None, :], 1)
        tl.store(bias + at, scale * constant, mask=real)


@triton.jit
def _ask_backward(
    parts, part_bias, place, chunks, real, queries, kept, key, key_bias, gain, shift,
    of_queries, of_readers, made, of_norm, of_key_bias, of_map_bias, K, H, E, D, W, scale,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries from those of readers and bias, in parts; the rest of the way is that of a LayerNorm."""
    always = real.to(tl.float32)
    for h in range(H):
        at = place + h * K
        of_bias = always * 0
        for c in range(chunks):
            of_bias += tl.load(part_bias + at + c * H * K, mask=real, other=0.0)
        of_bias *= scale
        for start in range(0, W, BLOCK_C):
            d = start + tl.arange(0, BLOCK_C)
            grad = tl.zeros([always.shape[0], BLOCK_C], tl.float32)
            for c in range(chunks):
                grad += _rows(parts, (at + c * H * K) * W, real, d, W)
            grad *= scale
            product = tl.zeros([always.shape[0], BLOCK_C], tl.float32)
            product = _product(queries + h * E, kept, real, E, key + h * E * D, d, D, D, 1, product, dtype, BLOCK_K)
            _add_rows(of_norm + 2 * h * D, product * grad, d, D)
            _add_rows(of_norm + 2 * h * D + D, product * of_bias[:, None], d, D)
            _write(of_readers + h * W, made, real, d, W, _affine(grad, gain, shift, of_bias, d, D))
        tl.debug_barrier()
        for start in range(0, E, BLOCK_C):
            e = start + tl.arange(0, BLOCK_C)
            grad = tl.zeros([always.shape[0], BLOCK_C], tl.float32)
            if key_bias is not None:
                grad += _vector(key_bias, e, E, h * E)[None, :] * of_bias[:, None]
                asked = _rows(queries + h * E, kept, real, e, E)
                _add_rows(of_key_bias + h * E, asked * of_bias[:, None], e, E)
            grad = _product(of_readers + h * W, made, real, D, key + h * E * D, e, E, 1, D, grad, dtype, BLOCK_K)
            _add_rows(of_map_bias + h * E, grad, e, E)
            _write(of_queries + h * E, made, real, e, E, grad)
    tl.debug_barrier()


@triton.jit
def _cell_backward(
    before, old, S, state, cells, at, carry, carry_at, gates, gates_at, sums, real,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of what a GRU adds up, the input's part and the state's; `carry` from the new state to the old."""
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        grad, was = _rows(carry, carry_at, real, column, S), _rows(before, old, real, column, S)
        reset, keep = _rows(cells, at, real, column, S), _rows(cells + S, at, real, column, S)
        new, part = _rows(cells + 2 * S, at, real, column, S), _rows(cells + 3 * S, at, real, column, S)
        _write(carry, carry_at, real, column, S, grad * keep)
        of_reset, of_keep, of_new, of_part = _gradients_of_gates(grad, was, reset, keep, new, part)
        for g in tl.static_range(2):
            _write(gates + 3 * g * S, gates_at, real, column, S, of_reset)
            _write(gates + 3 * g * S + S, gates_at, real, column, S, of_keep)
        _write(gates + 2 * S, gates_at, real, column, S, of_new)
        _write(gates + 5 * S, gates_at, real, column, S, of_part)
        _add_gates(sums, of_reset, of_keep, of_new, of_part, column, S)
    tl.debug_barrier()
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        value = _rows(carry, carry_at, real, column, S)
        value = _product(gates + 3 * S, gates_at, real, 3 * S, state, column, S, S, 1, value, dtype, BLOCK_K)
        _write(carry, carry_at, real, column, S, value)


@triton.jit
def _forward(
    sums, totals, means, total, slots, new, cells, before, now, readers, bias, token_readers, token_bias, token_gates,
    gain, shift, key, key_bias, value, value_bias, out, out_bias, input, state, input_bias, state_bias,
    mlp_gain, mlp_shift, expand, expand_bias, contract, contract_bias, slot_gain, slot_shift, query, query_bias,
    last_input, last_state, last_input_bias, last_state_bias,
    read_gain, read_shift, read_key, read_key_bias, read_value, read_value_bias, gate,
    token_gain, token_shift, token_query, token_query_bias,
    rows, K, H, chunks, D, W, S, E, M, U, stride, scale, token_scale, eps, mlp_eps, slot_eps, read_eps,
    HAS_READ: tl.constexpr, READS_ON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`new` slots from what `slots` have read, if they have; readers and bias of the next read, if there is one.

    In the two-way form there is a `last` cell after the MLP, and `new` slots become what tokens read: their readers,
    bias and the products with the `gate` of what they let in. What backward needs of an iteration's rows is kept
    `before` and `now`: see `Sizes.kept`.
    """
    dtype: tl.constexpr = readers.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    sample, slot, row = (row // K).to(tl.int64), row % K, row.to(tl.int64)
    kept = row * stride
    always = real.to(tl.float32)
    if HAS_READ:
        values, outs, hidden = before, before + _up(H * E), before + _up(H * E) + _up(S)
        normed = hidden + _up(M)
        whole = always * 0
        for h in range(H):  # what was read, over all chunks
            place = sample * chunks * H * K + h * K + slot
            whole = always * 0
            for c in range(chunks):
                whole += tl.load(totals + place + c * H * K, mask=real, other=0.0)
            at = (sample * H + h) * K + slot
            tl.store(total + at, whole, mask=real)
            divisor = tl.where(real, tl.maximum(whole, eps), 1.0)
            for start in range(0, W, BLOCK_K):
                d = start + tl.arange(0, BLOCK_K)
                mean = tl.zeros([ROWS, BLOCK_K], tl.float32)
                for c in range(chunks):
                    mean += _rows(sums, (place + c * H * K) * W, real, d, W)
                mean = mean / divisor[:, None]
                _write(means, at * W, real, d, W, mean)
        any_token = (whole > 0).to(tl.float32) * always
        shifted = normed + 2 * _up(S)
        for h in range(H):
            at = ((sample * H + h) * K + slot) * W
            for start in range(0, W, BLOCK_K):
                d = start + tl.arange(0, BLOCK_K)
                mean = _affine(_rows(means, at, real, d, W), gain, shift, any_token, d, D)
                _write(shifted + h * W, kept, real, d, W, mean)
        tl.debug_barrier()
        for h in range(H):  # line 8
            of_head = value_bias
            if value_bias is not None:
                of_head = value_bias + h * E
            _linear(
                shifted + h * W, kept, real, D, value + h * E * D, of_head, any_token, values + h * E, kept, E, 1, D,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
        tl.debug_barrier()
        update = values
        if out is not None:
            _linear(
                values, kept, real, H * E, out, out_bias, always, outs, kept, S, 1, H * E,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            update = outs
        between = row * 5 * S
        if last_input is not None:
            between = row * 9 * S
        _cell(  # line 9
            update, kept, U, slots, row * S, S, input, state, input_bias, state_bias, cells, between,
            cells + S, between, real, dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        _normalize(cells, between, real, S, mlp_eps, mlp_gain, mlp_shift, always, normed, kept, BLOCK_K)
        tl.debug_barrier()
        _linear(  # line 10
            normed, kept, real, S, expand, expand_bias, always, hidden, kept, M, 1, S, True, dtype, BLOCK_C, BLOCK_K
        )  # fmt: skip
        tl.debug_barrier()
        if last_input is None:
            for start in range(0, S, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                after = _rows(cells, between, real, column, S) + _vector(contract_bias, column, S)[None, :]
                after = _product(hidden, kept, real, M, contract, column, S, 1, M, after, dtype, BLOCK_K)
                _write(new, row * S, real, column, S, after)
            tl.debug_barrier()
        else:
            contracted = normed + 2 * _up(S) + H * W + _up(H * E)
            normed_read, keys, read = contracted + _up(S), contracted + 2 * _up(S), contracted + 2 * _up(S) + _up(D)
            _linear(
                hidden, kept, real, M, contract, contract_bias, always, contracted, kept, S, 1, M,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            _cell(
                contracted, kept, S, cells, between, S, last_input, last_state, last_input_bias, last_state_bias,
                new, row * S, cells + 5 * S, between, real, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            _ask(
                new, row, real, S, read_eps, read_gain, read_shift, read_key, read_key_bias, normed_read, keys, kept,
                token_query, token_query_bias, token_gain, token_shift, token_readers, token_bias, row, K, 1, D, D, W,
                token_scale, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            _linear(
                normed_read, kept, real, S, read_value, read_value_bias, always, read, kept, D, 1, S,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            _linear(
                read, kept, real, D, gate, None, always, token_gates, row * 3 * D, 3 * D, 1, D,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
    if READS_ON:
        current = slots
        if HAS_READ:
            current = new
        asked = now + _up(H * E) + 2 * _up(S) + _up(M)
        _ask(  # line 6
            current, row, real, S, slot_eps, slot_gain, slot_shift, query, query_bias, asked, asked + _up(S) + H * W,
            kept, key, key_bias, gain, shift, readers, bias, sample * H * K + slot, K, H, E, D, W, scale,
            dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _backward(
    parts, part_bias, token_parts, token_part_bias, of_token_gates, carry, scratch, slots, before, means, total, cells,
    kept_before, kept_now, made_before, made_now, summed_before, summed_now, norm_before, norm_now, of_means, centres,
    gain, shift, key, key_bias, value, out, input, state, mlp_gain, expand, contract, slot_gain, query,
    last_input, last_state, read_gain, read_key, read_value, gate, token_gain, token_shift, token_query,
    token_query_bias,
    rows, K, H, chunks, token_chunks, D, W, S, E, M, U, stride, made_stride, summed_stride,
    scale, token_scale, mlp_eps, slot_eps, read_eps,
    HAS_READ: tl.constexpr, READS_ON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The way back through `_forward` of the same arguments.

    `carry` comes as the gradient of the slots but for what `slots` ask next, whose gradients are `parts`, and but for
    what tokens read of them, and leaves as that of the slots `before`. Rows are written to MADE, sums of rows to
    SUMMED.
    """
    dtype: tl.constexpr = of_means.dtype.element_ty
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    real = row < rows
    sample, slot, row = (row // K).to(tl.int64), row % K, row.to(tl.int64)
    kept, made, at_carry = row * stride, row * made_stride, row * S
    always = real.to(tl.float32)
    if READS_ON:
        summed, of_norm = summed_now + program * summed_stride, norm_now + program * 4 * H * D
        of_slot_gain = summed + 2 * H * E + 10 * S + M
        _ask_backward(
            parts, part_bias, sample * chunks * H * K + slot, chunks, real,
            kept_now + _up(H * E) + 3 * _up(S) + _up(M) + H * W, kept, key, key_bias, gain, shift,
            made_now, made_now + _up(H * E), made, of_norm, summed, of_slot_gain + 2 * S, K, H, E, D, W, scale,
            dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        _normalize_backward(
            slots, row * S, real, S, slot_eps, slot_gain, always, made_now, made, H * E, query, None, 0, None,
            scratch, at_carry, carry, at_carry, of_slot_gain, of_slot_gain + S, dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
    if HAS_READ:
        summed, of_norm = summed_before + program * summed_stride, norm_before + (program * 2 + 1) * 2 * H * D
        of_value_bias = summed + H * E
        of_out_bias = of_value_bias + H * E
        of_input_bias = of_out_bias + S
        of_mlp_gain = of_input_bias + 6 * S
        of_expand_bias = of_mlp_gain + 2 * S
        of_contract_bias = of_expand_bias + M
        hidden = kept_before + _up(H * E) + _up(S)
        of_values = made_before + _up(H * E) + H * W
        of_outs, of_new = of_values + _up(H * E), of_values + _up(H * E) + _up(S)
        of_hidden, of_gates = of_new + _up(S), of_new + _up(S) + _up(M)
        old = of_gates + _up(6 * S)
        state_at = row * 5 * S
        if last_input is not None:
            state_at = row * 9 * S
        for start in range(0, S, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            _write(old, made, real, column, S, _rows(before, row * S, real, column, S))
        if last_input is None:
            for start in range(0, S, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                grad = _rows(carry, at_carry, real, column, S)
                _write(of_new, made, real, column, S, grad)
                _add_rows(of_contract_bias, grad, column, S)
        else:
            of_last, between = old + _up(S), old + _up(S) + _up(6 * S)
            of_keys, of_readers, of_read = between + _up(S), between + _up(S) + _up(D), between + _up(S) + _up(D) + W
            of_gate = of_read + _up(D)
            of_last_bias = of_contract_bias + 3 * S + H * E
            of_token_gain, of_read_gain = of_last_bias + 6 * S, of_last_bias + 6 * S + 2 * D
            of_query_bias = of_read_gain + 2 * S
            keys = kept_before + 2 * _up(H * E) + 5 * _up(S) + _up(M) + H * W
            _ask_backward(
                token_parts, token_part_bias, sample * token_chunks * K + slot, token_chunks, real, keys, kept,
                token_query, token_query_bias, token_gain, token_shift, of_keys, of_readers, made, of_token_gain,
                of_query_bias, of_query_bias + D, K, 1, D, D, W, token_scale, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            for start in range(0, D, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                for i in tl.static_range(3):  # the candidate comes first
                    grad = _rows(of_token_gates + (i + 1) % 3 * D, row * 3 * D, real, column, D)
                    _write(of_gate + i * D, made, real, column, D, grad)
            tl.debug_barrier()
            for start in range(0, D, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
                grad = _product(of_gate, made, real, 3 * D, gate, column, D, D, 1, grad, dtype, BLOCK_K)
                _add_rows(of_query_bias + 2 * D, grad, column, D)
                _write(of_read, made, real, column, D, grad)
            tl.debug_barrier()
            _normalize_backward(
                slots, row * S, real, S, read_eps, read_gain, always, of_keys, made, D, read_key, of_read, D,
                read_value, scratch, at_carry, carry, at_carry, of_read_gain, of_read_gain + S, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            _cell_backward(
                cells, state_at, S, last_state, cells + 5 * S, state_at, carry, at_carry, of_last, made, of_last_bias,
                real, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            for start in range(0, S, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                _write(between, made, real, column, S, _rows(cells, state_at, real, column, S))
                grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
                grad = _product(of_last, made, real, 3 * S, last_input, column, S, S, 1, grad, dtype, BLOCK_K)
                _write(of_new, made, real, column, S, grad)
                _add_rows(of_contract_bias, grad, column, S)
        tl.debug_barrier()
        for start in range(0, M, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
            grad = _product(of_new, made, real, S, contract, column, M, M, 1, grad, dtype, BLOCK_K)
            grad = tl.where(_rows(hidden, kept, real, column, M) > 0, grad, 0.0)
            _add_rows(of_expand_bias, grad, column, M)
            _write(of_hidden, made, real, column, M, grad)
        tl.debug_barrier()
        _normalize_backward(
            cells, state_at, real, S, mlp_eps, mlp_gain, always, of_hidden, made, M, expand, None, 0, None,
            scratch, at_carry, carry, at_carry, of_mlp_gain, of_mlp_gain + S, dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        _cell_backward(
            before, at_carry, S, state, cells + S, state_at, carry, at_carry, of_gates, made, of_input_bias, real,
            dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        of_update = of_values
        if out is not None:
            of_update = of_outs
        for start in range(0, U, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
            grad = _product(of_gates, made, real, 3 * S, input, column, U, U, 1, grad, dtype, BLOCK_K)
            _write(of_update, made, real, column, U, grad)
            if out is not None:
                _add_rows(of_out_bias, grad, column, U)
        tl.debug_barrier()
        if out is not None:
            _linear(
                of_outs, made, real, S, out, None, always, of_values, made, H * E, H * E, 1,
                False, dtype, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
        any_token = (tl.load(total + sample * H * K + slot, mask=real, other=0.0) > 0).to(tl.float32)
        for start in range(0, H * E, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            grad = _rows(of_values, made, real, column, H * E)
            _add_rows(of_value_bias, grad * any_token[:, None], column, H * E)
        for h in range(H):
            at = (sample * H + h) * K + slot
            centre = always * 0
            for start in range(0, W, BLOCK_C):
                d = start + tl.arange(0, BLOCK_C)
                grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
                grad = _product(of_values + h * E, made, real, E, value + h * E * D, d, D, D, 1, grad, dtype, BLOCK_K)
                mean = _rows(means, at * W, real, d, W)
                _add_rows(of_norm + 2 * h * D, grad * mean, d, D)
                _add_rows(of_norm + 2 * h * D + D, grad * any_token[:, None], d, D)
                grad = _cast(_affine(grad, gain, None, always, d, D), dtype)
                _write(of_means, at * W, real, d, W, grad)
                centre += tl.sum(grad.to(tl.float32) * mean, 1)
            tl.store(centres + at, centre, mask=real)


def of_backward(weights: Weights) -> list[Tensor | None]:
    """What `_backward` takes of the weights of slots, and None for what the two-way form has besides."""
    names = ("gain", "shift", "key", "key_bias", "value", "out", "input", "state", "mlp_gain", "expand", "contract")
    return [getattr(weights, name) for name in (*names, "slot_gain", "query", "last_input", "last_state")]


def tiling(dtype: torch.dtype) -> dict[str, int]:
    """How columns and what is summed over are cut, for products in `dtype`; warps, stages and registers."""
    columns, inner = (32, 16) if dtype == torch.float32 else (64, 64)
    # Programs are few: there is no other one on a multiprocessor to leave registers to.
    sizes = {"ROWS": ROWS, "BLOCK_C": columns, "BLOCK_K": inner}
    return {**sizes, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
