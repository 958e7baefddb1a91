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

from narrows.ops.slot_attention.triton import INTERPRETED, _cast


@triton.jit
def _up(width):
    """`width` as a multiple of 16, so that what lies beside it is aligned."""
    return (width + 15) // 16 * 16


@triton.jit
def _vector(bias, column, width):
    """A bias in float32, 0 where there is none."""
    value = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    return value


@triton.jit
def _rows(x, at, real, column, width):
    """A tile of rows in float32, 0 beyond them."""
    inside = real[:, None] & (column < width)[None, :]
    return tl.load(x + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(x, at, real, column, width, value):
    inside = real[:, None] & (column < width)[None, :]
    tl.store(x + at[:, None] + column[None, :], _cast(value, x.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(sums, value, column, width):
    """Writes the sum of the rows of `value`."""
    tl.store(sums + column, tl.sum(value, 0), mask=column < width)


@triton.jit
def _affine(value, gain, shift, shifted, column, width):
    """`value * gain + shift`, the shift times `shifted` of the row."""
    if gain is not None:
        value = value * _vector(gain, column, width)[None, :]
    if shift is not None:
        value += _vector(shift, column, width)[None, :] * shifted[:, None]
    return value


@triton.jit
def _statistics(x, at, real, width, eps, BLOCK: tl.constexpr):
    """Mean and inverse deviation of each row, as LayerNorm takes them."""
    total = tl.zeros(at.shape, tl.float32)
    for start in range(0, width, BLOCK):
        total += tl.sum(_rows(x, at, real, start + tl.arange(0, BLOCK), width), 1)
    mean = total / width
    total = tl.zeros(at.shape, tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = _rows(x, at, real, column, width) - mean[:, None]
        total += tl.sum(tl.where((column < width)[None, :], value * value, 0.0), 1)
    return mean, 1 / tl.sqrt(total / width + eps)


@triton.jit
def _multiply(left, right, accumulator, dtype: tl.constexpr):
    """`accumulator + left @ right` of tiles in `dtype`."""
    left, right = _cast(left, dtype), _cast(right, dtype)
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def _tile(weight, place, inner, column, columns, stride_inner, stride_column):
    offsets = place[:, None] * stride_inner + column[None, :] * stride_column
    return tl.load(weight + offsets, mask=(place < inner)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _product(
    x, at, real, inner, weight, column, columns, stride_inner, stride_column, accumulator,
    dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x, `inner` wide, times some columns of a weight."""
    for start in range(0, inner, BLOCK):
        place = start + tl.arange(0, BLOCK)
        some = real[:, None] & (place < inner)[None, :]
        value = tl.load(x + at[:, None] + place[None, :], mask=some, other=0.0)
        tile = _tile(weight, place, inner, column, columns, stride_inner, stride_column)
        accumulator = _multiply(value, tile, accumulator, dtype)
    return accumulator


@triton.jit
def _linear(
    x, at, real, inner, weight, bias, given, out, out_at, columns, stride_inner, stride_column,
    RELU: tl.constexpr, dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = x @ weight + given * bias`, or its ReLU; a weight's strides say which way round it lies."""
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        value = _vector(bias, column, columns)[None, :] * given[:, None]
        value = _product(
            x, at, real, inner, weight, column, columns, stride_inner, stride_column, value, dtype, BLOCK_K
        )  # fmt: skip
        if RELU:
            value = tl.maximum(value, 0.0)
        _write(out, out_at, real, column, columns, value)


@triton.jit
def _normalize(
    x, at, real, width, eps, gain, shift, always, out, out_at, BLOCK: tl.constexpr
):  # fmt: skip
    """`out = LayerNorm(x)`."""
    mean, inverse = _statistics(x, at, real, width, eps, BLOCK)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = (_rows(x, at, real, column, width) - mean[:, None]) * inverse[:, None]
        _write(out, out_at, real, column, width, _affine(value, gain, shift, always, column, width))


@triton.jit
def _normalize_backward(
    x, at, real, width, eps, gain, always, grad, grad_at, inner, weight, scratch, carry, row,
    of_gain, of_shift, dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds to `carry` the gradient of x, where that of LayerNorm(x) is `grad @ weight`, through `scratch`."""
    mean, inverse = _statistics(x, at, real, width, eps, BLOCK_K)
    plain, along = always * 0, always * 0
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        value = tl.zeros([at.shape[0], BLOCK_C], tl.float32)
        value = _product(grad, grad_at, real, inner, weight, column, width, width, 1, value, dtype, BLOCK_K)
        unit = (_rows(x, at, real, column, width) - mean[:, None]) * inverse[:, None]
        _add_rows(of_gain, value * unit, column, width)
        _add_rows(of_shift, value, column, width)
        value = _affine(value, gain, None, always, column, width)
        plain += tl.sum(value, 1)
        along += tl.sum(value * unit, 1)
        _write(scratch, row * width, real, column, width, value)
    tl.debug_barrier()
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        unit = (_rows(x, at, real, column, width) - mean[:, None]) * inverse[:, None]
        value = _rows(scratch, row * width, real, column, width)
        value = (value - (plain / width)[:, None] - unit * (along / width)[:, None]) * inverse[:, None]
        value += _rows(carry, row * width, real, column, width)
        _write(carry, row * width, real, column, width, value)
    tl.debug_barrier()


@triton.jit
def _cell(
    update, update_at, U, before, S, input, state, input_bias, state_bias, cells, row, real,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A GRU's new state, reset, update and candidate, and the state's part of the candidate, beside one another."""
    at, old = row * 5 * S, row * S
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        zeros = tl.zeros([row.shape[0], BLOCK_C], tl.float32)
        value = _product(update, update_at, real, U, input, column, S, 1, U, zeros, dtype, BLOCK_K)
        value = _product(before, old, real, S, state, column, S, 1, S, value, dtype, BLOCK_K)
        value += (_vector(input_bias, column, S) + _vector(state_bias, column, S))[None, :]
        _write(cells + S, at, real, column, S, tl.sigmoid(value))
        value = _product(update, update_at, real, U, input + S * U, column, S, 1, U, zeros, dtype, BLOCK_K)
        value = _product(before, old, real, S, state + S * S, column, S, 1, S, value, dtype, BLOCK_K)
        if input_bias is not None:
            value += _vector(input_bias + S, column, S)[None, :]
        if state_bias is not None:
            value += _vector(state_bias + S, column, S)[None, :]
        _write(cells + 2 * S, at, real, column, S, tl.sigmoid(value))
        value = _product(before, old, real, S, state + 2 * S * S, column, S, 1, S, zeros, dtype, BLOCK_K)
        if state_bias is not None:
            value += _vector(state_bias + 2 * S, column, S)[None, :]
        _write(cells + 4 * S, at, real, column, S, value)
        value = _product(update, update_at, real, U, input + 2 * S * U, column, S, 1, U, zeros, dtype, BLOCK_K)
        if input_bias is not None:
            value += _vector(input_bias + 2 * S, column, S)[None, :]
        _write(cells + 3 * S, at, real, column, S, value)
    tl.debug_barrier()
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        reset, keep = _rows(cells + S, at, real, column, S), _rows(cells + 2 * S, at, real, column, S)
        value = _rows(cells + 3 * S, at, real, column, S) + reset * _rows(cells + 4 * S, at, real, column, S)
        value = 2 * tl.sigmoid(2 * value) - 1  # tanh
        _write(cells + 3 * S, at, real, column, S, value)
        _write(cells, at, real, column, S, value + keep * (_rows(before, old, real, column, S) - value))
    tl.debug_barrier()


@triton.jit
def _cell_backward(
    before, S, state, cells, carry, gates, gates_at, of_input_bias, row, real,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of what a GRU adds up, of the input's part and of the state's; `carry` from the new state to the old.

    With the new state (1 - z) n + z h, n = tanh(i + r s), s the state's part of the candidate:

        dn = (1 - z) (1 - n^2) g,   dr = r (1 - r) s dn,   dz = z (1 - z) (h - n) g,   ds = r dn
    """
    at = row * 5 * S
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        grad = _rows(carry, row * S, real, column, S)
        reset, keep = _rows(cells + S, at, real, column, S), _rows(cells + 2 * S, at, real, column, S)
        new, part = _rows(cells + 3 * S, at, real, column, S), _rows(cells + 4 * S, at, real, column, S)
        _write(carry, row * S, real, column, S, grad * keep)
        of_keep = grad * (_rows(before, row * S, real, column, S) - new) * keep * (1 - keep)
        of_new = grad * (1 - keep) * (1 - new * new)
        of_reset, of_part = of_new * part * reset * (1 - reset), of_new * reset
        for g in tl.static_range(2):
            _write(gates + 3 * g * S, gates_at, real, column, S, of_reset)
            _write(gates + 3 * g * S + S, gates_at, real, column, S, of_keep)
            _add_rows(of_input_bias + 3 * g * S, of_reset, column, S)
            _add_rows(of_input_bias + 3 * g * S + S, of_keep, column, S)
        _write(gates + 2 * S, gates_at, real, column, S, of_new)
        _write(gates + 5 * S, gates_at, real, column, S, of_part)
        _add_rows(of_input_bias + 2 * S, of_new, column, S)
        _add_rows(of_input_bias + 5 * S, of_part, column, S)
    tl.debug_barrier()
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        value = _rows(carry, row * S, real, column, S)
        value = _product(gates + 3 * S, gates_at, real, 3 * S, state, column, S, S, 1, value, dtype, BLOCK_K)
        _write(carry, row * S, real, column, S, value)


@triton.jit
def _forward(
    sums, totals, means, total, slots, new, cells, before, now, readers, bias,
    gain, shift, key, key_bias, value, value_bias, out, out_bias, input, state, input_bias, state_bias,
    mlp_gain, mlp_shift, expand, expand_bias, contract, contract_bias, slot_gain, slot_shift, query, query_bias,
    rows, K, H, chunks, D, W, S, E, M, U, stride, scale, eps, mlp_eps, slot_eps,
    HAS_READ: tl.constexpr, READS_ON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`new` slots from what `slots` have read, if they have; readers and bias of the next read, if there is one.

    What backward needs of an iteration's rows is kept `before` and `now`: see `KEPT`.
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
        _cell(  # line 9
            update, kept, U, slots, S, input, state, input_bias, state_bias, cells, row, real, dtype, BLOCK_C, BLOCK_K
        )  # fmt: skip
        _normalize(cells, row * 5 * S, real, S, mlp_eps, mlp_gain, mlp_shift, always, normed, kept, BLOCK_K)
        tl.debug_barrier()
        _linear(  # line 10
            normed, kept, real, S, expand, expand_bias, always, hidden, kept, M, 1, S, True, dtype, BLOCK_C, BLOCK_K
        )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, S, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            after = _rows(cells, row * 5 * S, real, column, S) + _vector(contract_bias, column, S)[None, :]
            after = _product(hidden, kept, real, M, contract, column, S, 1, M, after, dtype, BLOCK_K)
            _write(new, row * S, real, column, S, after)
        tl.debug_barrier()
    if READS_ON:
        current = slots
        if HAS_READ:
            current = new
        asked = now + _up(H * E) + 2 * _up(S) + _up(M)
        queries = asked + _up(S) + H * W
        _normalize(current, row * S, real, S, slot_eps, slot_gain, slot_shift, always, asked, kept, BLOCK_K)
        tl.debug_barrier()
        _linear(  # line 6
            asked, kept, real, S, query, query_bias, always, queries, kept, H * E, 1, S, False, dtype, BLOCK_C, BLOCK_K
        )  # fmt: skip
        tl.debug_barrier()
        for h in range(H):  # keys are not made: their map is applied to the queries
            at = (sample * H + h) * K + slot
            constant = always * 0
            for start in range(0, W, BLOCK_C):
                d = start + tl.arange(0, BLOCK_C)
                product = tl.zeros([ROWS, BLOCK_C], tl.float32)
                product = _product(queries + h * E, kept, real, E, key + h * E * D, d, D, D, 1, product, dtype, BLOCK_K)
                constant += tl.sum(product * _vector(shift, d, D)[None, :], 1)
                _write(readers, at * W, real, d, W, scale * _affine(product, gain, None, always, d, D))
            if key_bias is not None:
                for start in range(0, E, BLOCK_K):
                    e = start + tl.arange(0, BLOCK_K)
                    part = _vector(key_bias + h * E, e, E)
                    constant += tl.sum(_rows(queries + h * E, kept, real, e, E) * part[None, :], 1)
            tl.store(bias + at, scale * constant, mask=real)


@triton.jit
def _backward(
    parts, part_bias, carry, scratch, slots, before, means, total, cells, kept_before, kept_now,
    made_before, made_now, summed_before, summed_now, norm_before, norm_now, of_means, centres,
    gain, shift, key, key_bias, value, out, input, state, mlp_gain, expand, contract, slot_gain, query,
    rows, K, H, chunks, D, W, S, E, M, U, stride, made_stride, summed_stride, scale, mlp_eps, slot_eps,
    HAS_READ: tl.constexpr, READS_ON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The way back through `_forward` of the same arguments.

    `carry` comes as the gradient of the slots but for what `slots` ask next, whose gradients are `parts`, and leaves as
    that of the slots `before`. Rows are written to MADE, sums of rows to SUMMED.
    """
    dtype: tl.constexpr = of_means.dtype.element_ty
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    real = row < rows
    sample, slot, row = (row // K).to(tl.int64), row % K, row.to(tl.int64)
    kept, made = row * stride, row * made_stride
    always = real.to(tl.float32)
    if READS_ON:
        summed, of_norm = summed_now + program * summed_stride, norm_now + program * 4 * H * D
        of_slot_gain = summed + 2 * H * E + 10 * S + M
        queries = kept_now + _up(H * E) + 3 * _up(S) + _up(M) + H * W
        of_queries, of_readers = made_now, made_now + _up(H * E)
        for h in range(H):
            place = sample * chunks * H * K + h * K + slot
            of_bias = always * 0
            for c in range(chunks):
                of_bias += tl.load(part_bias + place + c * H * K, mask=real, other=0.0)
            of_bias *= scale
            for start in range(0, W, BLOCK_C):
                d = start + tl.arange(0, BLOCK_C)
                grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
                for c in range(chunks):
                    grad += _rows(parts, (place + c * H * K) * W, real, d, W)
                grad *= scale
                product = tl.zeros([ROWS, BLOCK_C], tl.float32)
                product = _product(queries + h * E, kept, real, E, key + h * E * D, d, D, D, 1, product, dtype, BLOCK_K)
                _add_rows(of_norm + 2 * h * D, product * grad, d, D)
                _add_rows(of_norm + 2 * h * D + D, product * of_bias[:, None], d, D)
                _write(of_readers + h * W, made, real, d, W, _affine(grad, gain, shift, of_bias, d, D))
            tl.debug_barrier()
            for start in range(0, E, BLOCK_C):
                e = start + tl.arange(0, BLOCK_C)
                grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
                if key_bias is not None:
                    grad += _vector(key_bias + h * E, e, E)[None, :] * of_bias[:, None]
                    asked = _rows(queries + h * E, kept, real, e, E)
                    _add_rows(summed + h * E, asked * of_bias[:, None], e, E)
                grad = _product(of_readers + h * W, made, real, D, key + h * E * D, e, E, 1, D, grad, dtype, BLOCK_K)
                _add_rows(of_slot_gain + 2 * S + h * E, grad, e, E)
                _write(of_queries + h * E, made, real, e, E, grad)
        tl.debug_barrier()
        _normalize_backward(
            slots, row * S, real, S, slot_eps, slot_gain, always, of_queries, made, H * E, query, scratch, carry, row,
            of_slot_gain, of_slot_gain + S, dtype, BLOCK_C, BLOCK_K,
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
        for start in range(0, S, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            grad = _rows(carry, row * S, real, column, S)
            _write(of_new, made, real, column, S, grad)
            _add_rows(of_contract_bias, grad, column, S)
            _write(old, made, real, column, S, _rows(before, row * S, real, column, S))
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
            cells, row * 5 * S, real, S, mlp_eps, mlp_gain, always, of_hidden, made, M, expand, scratch, carry, row,
            of_mlp_gain, of_mlp_gain + S, dtype, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        _cell_backward(
            before, S, state, cells, carry, of_gates, made, of_input_bias, row, real, dtype, BLOCK_C, BLOCK_K
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


ROWS = 16  # of a program
OF_BACKWARD = ("gain", "shift", "key", "key_bias", "value", "out", "input", "state", "mlp_gain", "expand", "contract")
OF_BACKWARD += ("slot_gain", "query")


def tiling(dtype: torch.dtype) -> dict[str, int]:
    """How columns and what is summed over are cut, for products in `dtype`; warps, stages and registers."""
    inner = 16 if dtype == torch.float32 else 64
    # Programs are few: there is no other one on a multiprocessor to leave registers to.
    return {"ROWS": ROWS, "BLOCK_C": 64, "BLOCK_K": inner, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
