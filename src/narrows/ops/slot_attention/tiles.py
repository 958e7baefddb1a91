"""What kernels of slot attention do with tiles of rows: load, multiply, normalise, pass cells; and the ways back.

A product of float32 numbers is of the dtype it is told, with sums in float32. What lies beyond the rows or their width
is read as 0 and not written.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest; the interpreter would cut the bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _rows_of_program(slot_mask, b, H, K, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """The place of each row among the H * K real ones, whether it is one of them, and whether its slot takes part."""
    lane = tl.arange(0, ROWS)
    head, slot = lane // GROUP, lane % GROUP
    real = (slot < K) & (head < H)
    present = real
    if slot_mask is not None:
        present = real & (tl.load(slot_mask + b * K + slot, mask=real, other=0) != 0)
    return head * K + slot, real, present


@triton.jit
def _tokens_of_program(mask, b, n, N, stop):
    """Which tokens are real."""
    real = n < stop
    if mask is not None:
        real = real & (tl.load(mask + b * N + n, mask=real, other=0) != 0)
    return real


@triton.jit
def _load(base, rows, columns, real, width, stride):
    """A tile of rows `stride` apart, 0 where its row is not real or its column beyond `width`."""
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load(base + offsets, mask=real[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _softmax(logits, real, present, SOFTMAXES: tl.constexpr):
    """Over the rows of each group, for each token; 0 where the token is not real or the slot takes no part."""
    N: tl.constexpr = logits.shape[0]
    R: tl.constexpr = logits.shape[1]
    logits = tl.where(present[None, :], logits, -3e38)
    if SOFTMAXES == 1:
        logits = tl.exp(logits - tl.max(logits, 1)[:, None])
        attention = logits / tl.sum(logits, 1)[:, None]
    else:
        grouped = tl.reshape(logits, [N, SOFTMAXES, R // SOFTMAXES])
        grouped = tl.exp(grouped - tl.max(grouped, 2)[:, :, None])
        attention = tl.reshape(grouped / tl.sum(grouped, 2)[:, :, None], [N, R])
    return tl.where(real[:, None] & present[None, :], attention, 0.0)


@triton.jit
def _sum_over_slots(product, SOFTMAXES: tl.constexpr):
    """The sum over the rows of each group, in every row of it."""
    N: tl.constexpr = product.shape[0]
    R: tl.constexpr = product.shape[1]
    if SOFTMAXES == 1:
        total = tl.broadcast_to(tl.sum(product, 1)[:, None], [N, R])
    else:
        grouped = tl.reshape(product, [N, SOFTMAXES, R // SOFTMAXES])
        total = tl.broadcast_to(tl.sum(grouped, 2)[:, :, None], [N, SOFTMAXES, R // SOFTMAXES])
        total = tl.reshape(total, [N, R])
    return total


@triton.jit
def _dot(left, right, accumulator):
    """`accumulator + left @ right` of float32 `left` and `right` in the dtype of the tokens.

    A weight among many tokens would vanish in float16; TF32 has float16's precision and float32's range. float32 is
    multiplied as it is.
    """
    if right.dtype == tl.bfloat16:
        left = _cast(left, tl.bfloat16)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        accumulator = tl.dot(left, right, accumulator)
    elif right.dtype == tl.float16:
        accumulator = tl.dot(left, right.to(tl.float32), accumulator, input_precision="tf32")
    else:
        accumulator = tl.dot(left, right, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _against_rows(tokens, rows):
    """The product of every token with every row, of one dtype."""
    if INTERPRETED:
        tokens, rows = tokens.to(tl.float32), rows.to(tl.float32)
    return tl.dot(tokens, tl.trans(rows), input_precision="ieee")


@triton.jit
def _against_all(x, real, rows, row, real_row, D, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The product of every token with every row, over all of D."""
    ROWS: tl.constexpr = row.shape[0]
    product = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        tokens = _load(x, tl.arange(0, BLOCK_N), d, real, D, stride)
        product += _against_rows(tokens, _load(rows, row, d, real_row, D, D))
    return product


@triton.jit
def _up(width):
    """`width` as a multiple of 16, so that what lies beside it is aligned."""
    return (width + 15) // 16 * 16


@triton.jit
def _vector(bias, column, width, start=0):
    """Some of a vector, from `start` on, in float32, 0 where there is none."""
    value = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        value += tl.load(bias + start + column, mask=column < width, other=0.0).to(tl.float32)
    return value


@triton.jit
def _rows(x, at, real, column, width):
    """A tile of rows in float32, 0 beyond them."""
    return _load(x, at, column, real, width, 1).to(tl.float32)


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
        value = _load(x, at, place, real, inner, 1)
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
    x, at, real, width, eps, gain, always, grad, grad_at, inner, weight, other, other_inner, other_weight,
    scratch, scratch_at, carry, carry_at, of_gain, of_shift,
    dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds to `carry` the gradient of x through `scratch`.

    That of LayerNorm(x) is `grad @ weight`, and `other @ other_weight` where there is another.
    """
    mean, inverse = _statistics(x, at, real, width, eps, BLOCK_K)
    plain, along = always * 0, always * 0
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        value = tl.zeros([at.shape[0], BLOCK_C], tl.float32)
        value = _product(grad, grad_at, real, inner, weight, column, width, width, 1, value, dtype, BLOCK_K)
        if other is not None:
            value = _product(
                other, grad_at, real, other_inner, other_weight, column, width, width, 1, value, dtype, BLOCK_K
            )  # fmt: skip
        unit = (_rows(x, at, real, column, width) - mean[:, None]) * inverse[:, None]
        _add_rows(of_gain, value * unit, column, width)
        _add_rows(of_shift, value, column, width)
        value = _affine(value, gain, None, always, column, width)
        plain += tl.sum(value, 1)
        along += tl.sum(value * unit, 1)
        _write(scratch, scratch_at, real, column, width, value)
    tl.debug_barrier()
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        unit = (_rows(x, at, real, column, width) - mean[:, None]) * inverse[:, None]
        value = _rows(scratch, scratch_at, real, column, width)
        value = (value - (plain / width)[:, None] - unit * (along / width)[:, None]) * inverse[:, None]
        value += _rows(carry, carry_at, real, column, width)
        _write(carry, carry_at, real, column, width, value)
    tl.debug_barrier()


@triton.jit
def _of_state(before, at, real, S, state, input_bias, state_bias, column, dtype: tl.constexpr, BLOCK_K: tl.constexpr):
    """What state and biases of a GRU give to reset, update, candidate, and the state's part of the candidate."""
    there = real.to(tl.float32)[:, None]
    reset = (_vector(input_bias, column, S) + _vector(state_bias, column, S))[None, :] * there
    keep = (_vector(input_bias, column, S, S) + _vector(state_bias, column, S, S))[None, :] * there
    new = _vector(input_bias, column, S, 2 * S)[None, :] * there
    part = _vector(state_bias, column, S, 2 * S)[None, :] * there
    for start in range(0, S, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        value = _load(before, at, place, real, S, 1)
        reset = _multiply(value, _tile(state, place, S, column, S, 1, S), reset, dtype)
        keep = _multiply(value, _tile(state + S * S, place, S, column, S, 1, S), keep, dtype)
        part = _multiply(value, _tile(state + 2 * S * S, place, S, column, S, 1, S), part, dtype)
    return reset, keep, new, part


@triton.jit
def _of_input(update, at, real, U, input, S, column, reset, keep, new, dtype: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a GRU takes in, added to what `_of_state` gave."""
    for start in range(0, U, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        value = _load(update, at, place, real, U, 1)
        reset = _multiply(value, _tile(input, place, U, column, S, 1, U), reset, dtype)
        keep = _multiply(value, _tile(input + S * U, place, U, column, S, 1, U), keep, dtype)
        new = _multiply(value, _tile(input + 2 * S * U, place, U, column, S, 1, U), new, dtype)
    return reset, keep, new


@triton.jit
def _activate(reset, keep, new, part):
    """Reset, update and candidate of a GRU from what it adds up."""
    reset, keep = tl.sigmoid(reset), tl.sigmoid(keep)
    return reset, keep, 2 * tl.sigmoid(2 * (new + reset * part)) - 1  # tanh


@triton.jit
def _cell(
    update, update_at, U, before, before_at, S, input, state, input_bias, state_bias, out, out_at, cells, cells_at,
    real, dtype: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = GRU(update, before)`; reset, update, candidate and the state's part of it in `cells`, side by side."""
    for start in range(0, S, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        reset, keep, new, part = _of_state(
            before, before_at, real, S, state, input_bias, state_bias, column, dtype, BLOCK_K
        )
        reset, keep, new = _of_input(update, update_at, real, U, input, S, column, reset, keep, new, dtype, BLOCK_K)
        reset, keep, new = _activate(reset, keep, new, part)
        if cells is not None:
            _write(cells, cells_at, real, column, S, reset)
            _write(cells + S, cells_at, real, column, S, keep)
            _write(cells + 2 * S, cells_at, real, column, S, new)
            _write(cells + 3 * S, cells_at, real, column, S, part)
        old = _rows(before, before_at, real, column, S)
        _write(out, out_at, real, column, S, new + keep * (old - new))
    tl.debug_barrier()


@triton.jit
def _gradients_of_gates(grad, before, reset, keep, new, part):
    """Gradients of what a GRU adds up for reset, update, candidate, and for the state's part of the candidate.

    With the new state (1 - z) n + z h, n = tanh(i + r s), s the state's part of the candidate:

        dn = (1 - z) (1 - n^2) g,   dr = r (1 - r) s dn,   dz = z (1 - z) (h - n) g,   ds = r dn
    """
    of_keep = grad * (before - new) * keep * (1 - keep)
    of_new = grad * (1 - keep) * (1 - new * new)
    return of_new * part * reset * (1 - reset), of_keep, of_new, of_new * reset


@triton.jit
def _add_gates(sums, of_reset, of_keep, of_new, of_part, column, S):
    """Writes the gradients of the biases of a GRU, of what it takes in and of its state, beside one another."""
    for g in tl.static_range(2):
        _add_rows(sums + 3 * g * S, of_reset, column, S)
        _add_rows(sums + 3 * g * S + S, of_keep, column, S)
    _add_rows(sums + 2 * S, of_new, column, S)
    _add_rows(sums + 5 * S, of_part, column, S)
