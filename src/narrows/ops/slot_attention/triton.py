"""Slot attention on a GPU: one pass over the tokens in a read, products on tensor cores, nothing of size K x N kept.

Keys and values are the tokens themselves. A program takes one chunk of one sample's tokens:

    logits = tokens readers^T + bias,   A = softmax over slots,   sums += (A + eps)^T tokens,   totals += A + eps

and a second kernel adds the chunks up and divides. Rows are slots of all heads, padded to 16 or more, as tensor cores
want them. Backward makes the attention again; with g the gradient of the means u,

    dA = (g . x - g . u) / total,   dL = A (dA - sum_slots A dA),   dr = dL^T x,   dx = dL r + (A + eps) / total g

takes one pass that reads tokens for dr, and one that reads and writes them for dx, of any number of reads of the same
tokens at once. What is not loaded (masked tokens, padding) may hold anything.
"""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrows.ops.slot_attention.tiles import (
    INTERPRETED,
    _against_all,
    _against_rows,
    _cast,
    _dot,
    _load,
    _rows_of_program,
    _softmax,
    _sum_over_slots,
    _tokens_of_program,
)

MOST_ROWS, MOST_DIM = 64, 1024
CHUNK, MOST_CHUNKS = 256, 128


@triton.jit
def _against_both(x, real, rows, others, row, real_row, D, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The product of every token with every row, and with as many other rows."""
    ROWS: tl.constexpr = row.shape[0]
    product = tl.zeros([BLOCK_N, ROWS], tl.float32)
    other = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        tokens = _load(x, tl.arange(0, BLOCK_N), d, real, D, stride)
        product += _against_rows(tokens, _load(rows, row, d, real_row, D, D))
        other += _against_rows(tokens, _load(others, row, d, real_row, D, D))
    return product, other


@triton.jit
def _read(
    x, readers, bias, mask, slot_mask, sums, totals, attention,
    N, D, H, K, chunk, chunks, blocks, stride_b, stride_n, eps,
    ROWS: tl.constexpr, GROUP: tl.constexpr, SOFTMAXES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums `[B, chunks, H K, D]` and totals `[B, chunks, H K]` of one chunk; and the attention where it is wanted."""
    program = tl.program_id(0)
    block, c, b = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    row, real_row, present = _rows_of_program(slot_mask, b, H, K, ROWS, GROUP)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    x += b * stride_b
    readers += b * H * K * D
    stop = tl.minimum(c * chunk + chunk, N)
    if WHOLE:
        rows = _load(readers, row, d, present, D, D)
    shift = tl.zeros([ROWS], tl.float32)
    if bias is not None:
        shift += tl.load(bias + b * H * K + row, mask=present, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(c * chunk, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = _tokens_of_program(mask, b, n, N, stop)
        here = x + (tl.zeros([], tl.int64) + start) * stride_n
        tokens = _load(here, tl.arange(0, BLOCK_N), d, real, D, stride_n)
        if WHOLE:
            logits = _against_rows(tokens, rows)
        else:
            logits = _against_all(here, real, readers, row, present, D, stride_n, BLOCK_N, BLOCK_K)
        shares = _softmax(logits + shift[None, :], real, present, SOFTMAXES)
        if attention is not None:
            place = attention + (b * H * K + row)[None, :] * N + n[:, None]
            written = real_row[None, :] & (n < tl.where(block == 0, stop, 0))[:, None]
            tl.store(place, _cast(shares, attention.dtype.element_ty), mask=written)
        weights = tl.where(real[:, None] & real_row[None, :], shares + eps, 0.0)
        total += tl.sum(weights, 0)
        accumulator = _dot(tl.trans(weights), tokens, accumulator)
    at = (b * chunks + c) * H * K + row
    tl.store(sums + at[:, None] * D + d[None, :], accumulator, mask=real_row[:, None] & (d < D)[None, :])
    if block == 0:
        tl.store(totals + at, total, mask=real_row)


@triton.jit
def _add_chunks(sums, totals, means, total, eps, R, D, chunks, BLOCK_D: tl.constexpr, MEAN: tl.constexpr):
    """Of each row the sum over chunks `[B, H K, D]` and its total; the mean, and `eps` at least, with MEAN."""
    program = tl.program_id(0).to(tl.int64)
    first = program // R * chunks * R + program % R
    whole = tl.zeros([], tl.float32)
    for c in range(chunks):
        whole += tl.load(totals + first + c * R)
    if MEAN:
        whole = tl.maximum(whole, eps)
    tl.store(total + program, whole)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        accumulator = tl.zeros([BLOCK_D], tl.float32)
        for c in range(chunks):
            accumulator += tl.load(sums + (first + c * R) * D + d, mask=d < D, other=0.0)
        if MEAN:
            accumulator = accumulator / whole
        tl.store(means + program * D + d, accumulator, mask=d < D)


@triton.jit
def _gradient_of_logits(
    logits, product, centre, total, grad_attention, graded, first, N, row, present, n, real, SOFTMAXES: tl.constexpr
):
    """The attention and the gradient of its logits, from `product`, tokens times gradients of the means.

    `grad_attention` is that of the first `graded` tokens.
    """
    shares = _softmax(logits, real, present, SOFTMAXES)
    grad = (product - centre[None, :]) / total[None, :]
    both = real[:, None] & present[None, :]
    if grad_attention is not None:
        place = grad_attention + (first + row)[None, :] * N + n[:, None]
        grad += tl.load(place, mask=both & (n < graded)[:, None], other=0.0)
    weighted = tl.where(both, shares * grad, 0.0)
    return shares, weighted - shares * _sum_over_slots(weighted, SOFTMAXES)


@triton.jit
def _read_backward_rows(
    x, readers, bias, mask, slot_mask, grads, centres, totals, grad_attention, grad_readers, grad_bias,
    N, D, H, K, chunk, chunks, blocks, stride_b, stride_n,
    ROWS: tl.constexpr, GROUP: tl.constexpr, SOFTMAXES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one chunk, the gradients of readers `[B, chunks, H K, D]` and of bias `[B, chunks, H K]`."""
    program = tl.program_id(0)
    block, c, b = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    row, real_row, present = _rows_of_program(slot_mask, b, H, K, ROWS, GROUP)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    x += b * stride_b
    readers += b * H * K * D
    grads += b * H * K * D
    stop = tl.minimum(c * chunk + chunk, N)
    shift = tl.zeros([ROWS], tl.float32)
    if bias is not None:
        shift += tl.load(bias + b * H * K + row, mask=present, other=0.0)
    centre = tl.load(centres + b * H * K + row, mask=present, other=0.0)
    total = tl.load(totals + b * H * K + row, mask=present, other=1.0)
    summed = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(c * chunk, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = _tokens_of_program(mask, b, n, N, stop)
        here = x + (tl.zeros([], tl.int64) + start) * stride_n
        logits, product = _against_both(here, real, readers, grads, row, present, D, stride_n, BLOCK_N, BLOCK_K)
        _, grad = _gradient_of_logits(
            logits + shift[None, :], product, centre, total, grad_attention, N, b * H * K, N, row, present, n, real,
            SOFTMAXES,
        )  # fmt: skip
        summed += tl.sum(grad, 0)
        tokens = _load(here, tl.arange(0, BLOCK_N), d, real, D, stride_n)
        accumulator = _dot(tl.trans(grad), tokens, accumulator)
    at = (b * chunks + c) * H * K + row
    tl.store(grad_readers + at[:, None] * D + d[None, :], accumulator, mask=real_row[:, None] & (d < D)[None, :])
    if block == 0:
        tl.store(grad_bias + at, summed, mask=real_row)


@triton.jit
def _read_backward_tokens(
    x, readers, bias, mask, slot_mask, grads, centres, totals, grad_attention, grad_x,
    B, N, D, H, K, reads, graded, tiles, blocks, stride_b, stride_n, eps,
    ROWS: tl.constexpr, GROUP: tl.constexpr, SOFTMAXES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of tokens, of all reads of them; `grad_attention` is that of the last `graded`."""
    program = tl.program_id(0)
    block, tile, b = program % blocks, program // blocks % tiles, (program // blocks // tiles).to(tl.int64)
    row, real_row, present = _rows_of_program(slot_mask, b, H, K, ROWS, GROUP)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = _tokens_of_program(mask, b, n, N, N)
    x += b * stride_b + (tile * BLOCK_N).to(tl.int64) * stride_n
    accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for t in range(reads):
        at = (t * B + b) * H * K
        rows = _load(readers + at * D, row, d, present, D, D)
        grad_rows = _load(grads + at * D, row, d, real_row, D, D)
        logits, product = _against_both(
            x, real, readers + at * D, grads + at * D, row, real_row, D, stride_n, BLOCK_N, BLOCK_K
        )
        if bias is not None:
            logits += tl.load(bias + at + row, mask=present, other=0.0)[None, :]
        centre = tl.load(centres + at + row, mask=present, other=0.0)
        total = tl.load(totals + at + row, mask=real_row, other=1.0)
        last = t + graded - reads
        of_last = tl.where(last < 0, 0, N)
        shares, grad = _gradient_of_logits(
            logits, product, centre, total, grad_attention, of_last, (tl.maximum(last, 0) * B + b) * H * K, N, row,
            present, n, real,
            SOFTMAXES,
        )  # fmt: skip
        weights = tl.where(real[:, None] & real_row[None, :], (shares + eps) / total[None, :], 0.0)
        accumulator = _dot(grad, rows, accumulator)
        accumulator = _dot(weights, grad_rows, accumulator)
    grad_x += (b * N + tile * BLOCK_N) * D
    place = grad_x + tl.arange(0, BLOCK_N)[:, None] * D + d[None, :]
    tl.store(place, _cast(accumulator, grad_x.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


class Tiling(NamedTuple):
    """How tokens, rows and columns are cut for one program, and how many warps it takes.

    Args:
        rows: of all heads, a power of two from 16.
        group: rows of one head.
        softmaxes: how many groups of rows have a softmax of their own.
        tokens: in a tile.
        columns: of the sums that a program keeps.
        inner: columns multiplied at a time.
        warps: of a program.
        stages: tiles under way at once.
    """

    rows: int
    group: int
    softmaxes: int
    tokens: int
    columns: int
    inner: int
    warps: int
    stages: int

    @classmethod
    def of(cls, heads: int, slots: int, dim: int, dtype: torch.dtype, joint_heads: bool) -> "Tiling":
        """For slots of `heads` heads and tokens of width `dim`, a multiple of 16."""
        group = triton.next_power_of_2(slots)
        if heads == 1:
            group = max(16, group)
        rows = max(16, group * triton.next_power_of_2(heads))
        softmaxes = 1 if joint_heads or heads == 1 else rows // group
        width = triton.next_power_of_2(dim)
        if dtype == torch.float32:
            tokens, columns, inner, warps, stages = 16, 64, 16, 8, 1
        else:
            tokens, columns, inner, warps, stages = (32, 256, 64, 4, 3) if rows == 16 else (32, 128, 64, 8, 3)
        return cls(rows, group, softmaxes, tokens, min(width, columns), min(width, inner), warps, stages)

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        names = {"ROWS": self.rows, "GROUP": self.group, "SOFTMAXES": self.softmaxes, "BLOCK_N": self.tokens}
        sizes = {"BLOCK_D": self.columns, "BLOCK_K": self.inner, "num_warps": self.warps, "num_stages": self.stages}
        return {**names, **sizes}


def why_not(device: torch.device, dtype: torch.dtype, dim: int, heads: int, slots: int) -> str | None:
    """The reason why the kernels cannot read such tokens with so many slots, or None where they can."""
    if device.type != ("cpu" if INTERPRETED.value else "cuda"):
        return f"tokens are on {device.type}, not on a CUDA device"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"tokens are {dtype}, not float32, bfloat16 or float16"
    if slots > MOST_ROWS // triton.next_power_of_2(heads) or dim > MOST_DIM:  # One guard, under compilers.
        return f"it takes {MOST_ROWS} slots of all heads, and tokens {MOST_DIM} wide, at most"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than the A100"
    return None


def chunks_of(num_tokens: int) -> tuple[int, int]:
    """How many tokens a program reads, and how many programs read a sample."""
    length = max(CHUNK, -(-num_tokens // MOST_CHUNKS // 32) * 32)
    return length, max(1, -(-num_tokens // length))


def on_device_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launch kernels on the device of the first argument, whichever is the current one."""

    @wraps(run)
    def guarded(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tokens):
            return run(tokens, *arguments, **options)

    return guarded


def aligned(tokens: Tensor) -> Tensor:
    """Tokens whose rows lie as the kernels load them: a multiple of 16 wide, columns next to one another."""
    if tokens.shape[-1] % 16:
        return torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % 16))
    if tokens.stride(2) != 1 or tokens.stride(1) * 64 >= 2**31:
        return tokens.contiguous()
    return tokens


class Read(NamedTuple):
    """What all reads of the same tokens share.

    Args:
        tokens: `[B, N, D]`, aligned.
        mask: `[B, N]`, contiguous, or None.
        slot_mask: `[B, K]`, contiguous, or None.
        heads: H.
        slots: K.
        joint_heads: one softmax over slots and heads together.
        eps: added to the attention.
    """

    tokens: Tensor
    mask: Tensor | None
    slot_mask: Tensor | None
    heads: int
    slots: int
    joint_heads: bool
    eps: float

    @property
    def tiling(self) -> Tiling:
        """For these tokens and slots."""
        return Tiling.of(self.heads, self.slots, self.tokens.shape[-1], self.tokens.dtype, self.joint_heads)

    def forward(self, readers: Tensor, bias: Tensor | None, attention: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums `[B, chunks, H K, D]` and totals `[B, chunks, H K]` for readers `[B, H K, D]` in the tokens' dtype."""
        batch, num_tokens, dim = self.tokens.shape
        tiling, rows = self.tiling, self.heads * self.slots
        length, chunks = chunks_of(num_tokens)
        sums = readers.new_empty(batch, chunks, rows, dim, dtype=torch.float32)
        totals = readers.new_empty(batch, chunks, rows, dtype=torch.float32)
        blocks = triton.cdiv(dim, tiling.columns)
        whole = blocks == 1 and tiling.rows == 16 and self.tokens.dtype != torch.float32
        if batch:
            _read[(batch * chunks * blocks,)](
                self.tokens, readers, bias, self.mask, self.slot_mask, sums, totals, attention,
                num_tokens, dim, self.heads, self.slots, length, chunks, blocks, *self.tokens.stride()[:2], self.eps,
                WHOLE=whole, **tiling.constants(),
            )  # fmt: skip
        return sums, totals

    def backward_rows(
        self,
        readers: Tensor,
        bias: Tensor | None,
        grads: Tensor,
        centres: Tensor,
        totals: Tensor,
        grad_attention: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Of each chunk the gradient of readers `[B, chunks, H K, D]`, and of bias."""
        batch, num_tokens, dim = self.tokens.shape
        tiling, rows = self.tiling, self.heads * self.slots
        length, chunks = chunks_of(num_tokens)
        grad_readers = readers.new_empty(batch, chunks, rows, dim, dtype=torch.float32)
        grad_bias = readers.new_empty(batch, chunks, rows, dtype=torch.float32)
        blocks = triton.cdiv(dim, tiling.columns)
        if batch:
            _read_backward_rows[(batch * chunks * blocks,)](
                self.tokens, readers, bias, self.mask, self.slot_mask, grads, centres, totals, grad_attention,
                grad_readers, grad_bias,
                num_tokens, dim, self.heads, self.slots, length, chunks, blocks, *self.tokens.stride()[:2],
                **tiling.constants(),
            )  # fmt: skip
        return grad_readers, grad_bias

    def backward_tokens(
        self,
        readers: Tensor,
        bias: Tensor | None,
        grads: Tensor,
        centres: Tensor,
        totals: Tensor,
        grad_attention: Tensor | None,
    ) -> Tensor:
        """The gradient of the tokens, of reads `[T, B, H K, ...]`; `grad_attention [t, B, H K, N]` of the last t."""
        batch, num_tokens, dim = self.tokens.shape
        tiling = self.tiling
        grad_tokens = self.tokens.new_empty(batch, num_tokens, dim)
        tiles, blocks = triton.cdiv(num_tokens, tiling.tokens), triton.cdiv(dim, tiling.columns)
        if batch and num_tokens:
            _read_backward_tokens[(batch * tiles * blocks,)](
                self.tokens, readers, bias, self.mask, self.slot_mask, grads, centres, totals, grad_attention,
                grad_tokens,
                batch, num_tokens, dim, self.heads, self.slots, readers.shape[0],
                0 if grad_attention is None else grad_attention.shape[0], tiles, blocks,
                *self.tokens.stride()[:2], self.eps, **tiling.constants(),
            )  # fmt: skip
        return grad_tokens


def add_chunks(sums: Tensor, totals: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """The sums over chunks, `[B, H K, D]` and `[B, H K]`; the means where an `eps` is given."""
    batch, chunks, rows, dim = sums.shape
    added, total = sums.new_empty(batch, rows, dim), totals.new_empty(batch, rows)
    if batch:
        width = min(256, triton.next_power_of_2(dim))
        _add_chunks[(batch * rows,)](
            sums, totals, added, total, 0.0 if eps is None else eps, rows, dim, chunks, width, eps is not None
        )
    return added, total
