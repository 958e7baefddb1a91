"""Kernels with which tokens read slots and update themselves, in the two-way form; and the way back.

A program takes a tile of tokens through its cells and its MLP. What a product needs of all columns of the one before
goes through memory (the caches, that is: a program reads what it wrote itself, after a barrier), so that rows of any
width pass through tiles of one size, and tokens are read once and written once. Backward makes what the cells add up
again, and writes the rows whose products are the gradients of matrices: those are PyTorch's.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl

from narrows.ops.slot_attention.tiles import (
    _activate,
    _add_gates,
    _add_rows,
    _against_all,
    _against_rows,
    _cast,
    _cell,
    _dot,
    _gradients_of_gates,
    _linear,
    _load,
    _normalize,
    _normalize_backward,
    _of_input,
    _of_state,
    _product,
    _rows,
    _rows_of_program,
    _softmax,
    _tokens_of_program,
    _write,
)


@triton.jit
def _read(normed, readers, bias, real, lane, present, total, eps, W, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weights with which tokens read slots, over their `total` where there is one."""
    logits = _against_all(normed, real, readers, lane, present, W, W, BLOCK_N, BLOCK_K)
    weights = _softmax(logits + tl.load(bias + lane, mask=present, other=0.0)[None, :], real, present, 1)
    if total is not None:
        weights = tl.where(real[:, None] & present[None, :], (weights + eps) / total[None, :], 0.0)
    return weights


@triton.jit
def _tile_of_program(mask, slot_mask, tiles, N, K, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sample and first token; the slots, which are there and which take part; the tokens, which are there and real."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    lane, known, present = _rows_of_program(slot_mask, b, 1, K, ROWS, ROWS)
    n = first + tl.arange(0, BLOCK_N)
    return b, first, lane, known, present, n, n < N, _tokens_of_program(mask, b, n, N, N)


@triton.jit
def _first_cell(
    tokens, at, here, D, state, input_bias, state_bias, weights, gates, lane, present, column,
    dtype: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the cell adds up that takes in what tokens read of the slots' gates."""
    reset, keep, new, part = _of_state(tokens, at, here, D, state, input_bias, state_bias, column, dtype, BLOCK_K)
    reset = _dot(weights, _load(gates, lane, column, present, D, 3 * D), reset)
    keep = _dot(weights, _load(gates + D, lane, column, present, D, 3 * D), keep)
    return reset, keep, _dot(weights, _load(gates + 2 * D, lane, column, present, D, 3 * D), new), part


@triton.jit
def _forward(
    tokens, normed, readers, bias, gates, parts, totals, mask, slot_mask,
    input_bias, state, state_bias, mlp_gain, mlp_shift, expand, expand_bias, contract, contract_bias,
    last_input, last_state, last_input_bias, last_state_bias, between, hidden, contracted, out,
    N, D, W, K, M, tiles, chunks, eps, mlp_eps, norm_eps,
    READS_ON: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out`, which may be `tokens`, of a tile; what backward needs, and `normed` anew where tokens are read once more.

    `parts` are the sums over tokens of what is read of each slot, where weights are divided by them.
    """
    dtype: tl.constexpr = tokens.dtype.element_ty
    b, first, lane, known, present, n, here, real = _tile_of_program(mask, slot_mask, tiles, N, K, ROWS, BLOCK_N)
    always = here.to(tl.float32)
    token = b * N + n
    at = token * D
    total = None
    if parts is not None:
        total = tl.zeros([ROWS], tl.float32)
        for c in range(chunks):
            total += tl.load(parts + (b * chunks + c) * K + lane, mask=present, other=1.0)
        total = tl.maximum(total, eps)
        tl.store(totals + b * K + lane, total, mask=known & (lane < tl.where(first == 0, K, 0)))
    weights = _read(
        normed + (b * N + first) * W, readers + b * K * W, bias + b * K, real, lane, present, total, eps, W,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    gates += b * K * 3 * D
    for start in range(0, D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        reset, keep, new, part = _first_cell(
            tokens, at, here, D, state, input_bias, state_bias, weights, gates, lane, present, column, dtype, BLOCK_K
        )
        reset, keep, new = _activate(reset, keep, new, part)
        old = _rows(tokens, at, here, column, D)
        _write(between, at, here, column, D, new + keep * (old - new))
    tl.debug_barrier()
    _normalize(between, at, here, D, mlp_eps, mlp_gain, mlp_shift, always, out, at, BLOCK_K)  # for a while
    tl.debug_barrier()
    _linear(
        out, at, here, D, expand, expand_bias, always, hidden, token * M, M, 1, D, True, dtype, BLOCK_C, BLOCK_K
    )  # fmt: skip
    tl.debug_barrier()
    _linear(
        hidden, token * M, here, M, contract, contract_bias, always, contracted, at, D, 1, M,
        False, dtype, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    _cell(
        contracted, at, D, between, at, D, last_input, last_state, last_input_bias, last_state_bias, out, at, None, at,
        here, dtype, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    if READS_ON:
        _normalize(out, at, here, D, norm_eps, None, None, always, normed, token * W, BLOCK_K)


@triton.jit
def _gate_gradients(
    state_rows, at, real, D, carry_in, carry_out, reset, keep, new, part, gates, gates_at, sums, column
):
    """Gradients of candidate, reset, update and the state's part side by side; and `carry` from new state to old."""
    reset, keep, new = _activate(reset, keep, new, part)
    grad, old = _rows(carry_in, at, real, column, D), _rows(state_rows, at, real, column, D)
    _write(carry_out, at, real, column, D, grad * keep)
    of_reset, of_keep, of_new, of_part = _gradients_of_gates(grad, old, reset, keep, new, part)
    _write(gates, gates_at, real, column, D, of_new)
    _write(gates + D, gates_at, real, column, D, of_reset)
    _write(gates + 2 * D, gates_at, real, column, D, of_keep)
    _write(gates + 3 * D, gates_at, real, column, D, of_part)
    _add_gates(sums, of_reset, of_keep, of_new, of_part, column, D)


@triton.jit
def _backward(
    tokens, normed, readers, bias, gates, totals, mask, slot_mask, between, hidden, contracted, carry,
    input_bias, state, state_bias, mlp_gain, mlp_shift, expand, contract,
    last_input, last_state, last_input_bias, last_state_bias,
    of_cell, of_last, of_contracted, of_hidden, unit, of_between, read, of_read, centres, sums,
    N, D, W, K, M, tiles, eps, mlp_eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The way back through `_forward`: `carry` comes as the gradient of `out`.

    It leaves as that of `tokens` but for what they read. Of what they read it gives the weights, `read`, and their
    gradients, `of_read`, divided by the totals, with their `centres` where there are such.
    """
    dtype: tl.constexpr = tokens.dtype.element_ty
    b, first, lane, known, present, n, here, real = _tile_of_program(mask, slot_mask, tiles, N, K, ROWS, BLOCK_N)
    always = here.to(tl.float32)
    token = b * N + n
    at, wide, hidden_at = token * D, token * 4 * D, token * M
    program = tl.program_id(0).to(tl.int64)
    sums += program * (15 * D + M)
    of_mlp_gain = sums + 6 * D
    of_expand_bias, of_contract_bias = of_mlp_gain + 2 * D, of_mlp_gain + 2 * D + M
    for start in range(0, D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        reset, keep, new, part = _of_state(
            between, at, here, D, last_state, last_input_bias, last_state_bias, column, dtype, BLOCK_K
        )  # fmt: skip
        reset, keep, new = _of_input(
            contracted, at, here, D, last_input, D, column, reset, keep, new, dtype, BLOCK_K
        )  # fmt: skip
        _gate_gradients(
            between, at, here, D, carry, of_between, reset, keep, new, part, of_last, wide, of_contract_bias + D, column
        )  # fmt: skip
    tl.debug_barrier()
    for start in range(0, D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        grad = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        grad = _product(of_last + D, wide, here, 2 * D, last_input, column, D, D, 1, grad, dtype, BLOCK_K)
        grad = _product(of_last, wide, here, D, last_input + 2 * D * D, column, D, D, 1, grad, dtype, BLOCK_K)
        _add_rows(of_contract_bias, grad, column, D)
        _write(of_contracted, at, here, column, D, grad)
        grad = _rows(of_between, at, here, column, D)
        grad = _product(of_last + D, wide, here, 3 * D, last_state, column, D, D, 1, grad, dtype, BLOCK_K)
        _write(of_between, at, here, column, D, grad)
    tl.debug_barrier()
    for start in range(0, M, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        grad = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        grad = _product(of_contracted, at, here, D, contract, column, M, M, 1, grad, dtype, BLOCK_K)
        grad = tl.where(_rows(hidden, hidden_at, here, column, M) > 0, grad, 0.0)
        _add_rows(of_expand_bias, grad, column, M)
        _write(of_hidden, hidden_at, here, column, M, grad)
    tl.debug_barrier()
    _normalize(between, at, here, D, mlp_eps, mlp_gain, mlp_shift, always, unit, at, BLOCK_K)
    _normalize_backward(
        between, at, here, D, mlp_eps, mlp_gain, always, of_hidden, hidden_at, M, expand, None, 0, None,
        carry, at, of_between, at, of_mlp_gain, of_mlp_gain + D, dtype, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    total = None
    if totals is not None:
        total = tl.load(totals + b * K + lane, mask=present, other=1.0)
    gates += b * K * 3 * D
    weights = _read(
        normed + (b * N + first) * W, readers + b * K * W, bias + b * K, real, lane, present, total, eps, W,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    for start in range(0, D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        reset, keep, new, part = _first_cell(
            tokens, at, here, D, state, input_bias, state_bias, weights, gates, lane, present, column, dtype, BLOCK_K
        )
        _gate_gradients(
            tokens, at, here, D, of_between, carry, reset, keep, new, part, of_cell, wide, sums, column
        )  # fmt: skip
    tl.debug_barrier()
    for start in range(0, D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        grad = _rows(carry, at, here, column, D)
        grad = _product(of_cell + D, wide, here, 3 * D, state, column, D, D, 1, grad, dtype, BLOCK_K)
        _write(carry, at, here, column, D, grad)
    grad = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, D, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        for i in tl.static_range(3):  # the candidate stands first among the gradients, and last among the gates
            rows = _load(gates + (i + 2) % 3 * D, lane, column, present, D, 3 * D)
            grad += _against_rows(_load(of_cell + i * D, wide, column, here, D, 1), rows)
    there = real[:, None] & present[None, :]
    if total is not None:
        tl.store(centres + program * K + lane, tl.sum(grad * weights, 0), mask=known)
        grad = grad / total[None, :]
    place = (b * K + lane)[None, :] * N + n[:, None]
    tl.store(of_read + place, grad, mask=there)
    tl.store(read + place, _cast(weights, read.dtype.element_ty), mask=here[:, None] & known[None, :])


def tiling(slots: int, dtype: torch.dtype, *, backward: bool = False) -> dict[str, int]:
    """How tokens and columns are cut for so many slots, and how many warps a program takes; backward holds more."""
    rows = max(16, triton.next_power_of_2(slots))
    if dtype == torch.float32:
        tokens, inner, stages = 16 if backward or rows == 16 else 32, 16, 1  # of 16 rows more tokens spill
    else:
        tokens, inner, stages = 128 if rows == 16 and not backward else 64, 32, 2
    sizes = {"ROWS": rows, "BLOCK_N": tokens, "BLOCK_C": 32, "BLOCK_K": inner}
    return {**sizes, "num_warps": 8, "num_stages": stages}
