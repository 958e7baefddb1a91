"""One read of slot attention on a GPU as an operator of PyTorch's, and its gradients."""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.slot_attention.common import gradients_of
from narrows.ops.slot_attention.common import read as read_plainly
from narrows.ops.slot_attention.triton import Read, add_chunks, aligned, on_device_of


@torch.library.custom_op("narrows::slot_read", mutates_args=())
@on_device_of
def _slot_read(
    tokens: Tensor,
    readers: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    joint_heads: bool,
    eps: float,
    with_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means `[B, H, K, D]` and totals `[B, H, K]` in float32, and the attention `[B, H, K, N]`, empty if not wanted."""
    batch, heads, slots, dim = readers.shape
    task = Read(aligned(tokens), mask, slot_mask, heads, slots, joint_heads, eps)
    attention = readers.new_empty(
        (batch, heads, slots, tokens.shape[1]) if with_attention else (0,), dtype=torch.float32
    )
    readers = _as_wide(readers, task.tokens)
    sums, totals = task.forward(readers, bias, attention if with_attention else None)
    means, total = add_chunks(sums, totals, eps)
    return means[..., :dim].contiguous().view(batch, heads, slots, dim), total.view(batch, heads, slots), attention


@_slot_read.register_fake
def _(tokens: Tensor, readers: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    attention = (*readers.shape[:3], tokens.shape[1]) if options[-1] else (0,)
    sizes = (readers.shape, readers.shape[:3], attention)
    return tuple(readers.new_empty(size, dtype=torch.float32) for size in sizes)  # pyright: ignore[reportReturnType]


@torch.library.custom_op("narrows::slot_read_backward", mutates_args=())
@on_device_of
def _slot_read_backward(
    tokens: Tensor,
    readers: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    joint_heads: bool,
    eps: float,
    grad: Tensor,
    means: Tensor,
    totals: Tensor,
    grad_attention: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, and of readers and bias; empty where not `wanted`."""
    batch, heads, slots, dim = readers.shape
    task = Read(aligned(tokens), mask, slot_mask, heads, slots, joint_heads, eps)
    centres, readers, grads = (grad * means).sum(-1), *(_as_wide(x, task.tokens) for x in (readers, grad.to(tokens)))
    grad_tokens, grad_readers, grad_bias = readers.new_empty(0), readers.new_empty(0), totals.new_empty(0)
    if wanted[0]:
        read = (None if x is None else x[None] for x in (readers, bias, grads, centres, totals, grad_attention))
        grad_tokens = task.backward_tokens(*read)  # pyright: ignore[reportArgumentType]
        grad_tokens = grad_tokens if tokens.shape == grad_tokens.shape else grad_tokens[..., :dim].contiguous()
    if wanted[1]:
        parts = task.backward_rows(readers, bias, grads, centres, totals, grad_attention)
        grad_readers, grad_bias = add_chunks(*parts, None)
        grad_readers = grad_readers[..., :dim].to(tokens.dtype, memory_format=torch.contiguous_format)
        grad_readers, grad_bias = grad_readers.view(batch, heads, slots, dim), grad_bias.view(batch, heads, slots)
    return grad_tokens, grad_readers, grad_bias


@_slot_read_backward.register_fake
def _(tokens: Tensor, readers: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_tokens, of_readers = options[-1]
    return (
        tokens.new_empty(tokens.shape if of_tokens else (0,)),
        tokens.new_empty(readers.shape if of_readers else (0,)),
        tokens.new_empty(readers.shape[:3] if of_readers else (0,), dtype=torch.float32),
    )


def _as_wide(rows: Tensor, tokens: Tensor) -> Tensor:
    """Rows as wide as aligned tokens."""
    wide = tokens.shape[-1] - rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, wide)) if wide else rows.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, readers, bias, mask, slot_mask, ctx.joint_heads, ctx.eps, _ = inputs
    means, totals, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, readers, bias, mask, slot_mask, means, totals)


def _backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None, grad_attention: Tensor | None
) -> tuple[Tensor | None, ...]:
    tokens, readers, bias, mask, slot_mask, means, totals = ctx.saved_tensors
    options = mask, slot_mask, ctx.joint_heads, ctx.eps
    if torch.is_grad_enabled():  # to be differentiated once more

        def plain(tokens: Tensor, readers: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return read_plainly(readers, bias, tokens[:, None], None, *options, torch.float32)

        return *gradients_of(plain, (tokens, readers, bias), (grad, grad_attention)), *[None] * 5
    grad = torch.zeros_like(means) if grad is None else grad
    grad_attention = None if grad_attention is None else grad_attention.contiguous()
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]]
    found = torch.ops.narrows.slot_read_backward(
        tokens, readers, bias, *options, grad, means, totals, grad_attention, wanted
    )
    needed = zip(ctx.needs_input_grad, found, strict=False)
    return *(one if need else None for need, one in needed), *[None] * 5


_slot_read.register_autograd(_backward, setup_context=_keep)


def read(
    tokens: Float[Tensor, "B N D"],
    readers: Float[Tensor, "B H K D"],
    bias: Float[Tensor, "B H K"] | None = None,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
    *,
    joint_heads: bool = False,
    eps: float = 1e-8,
    with_attention: bool = True,
) -> tuple[Float[Tensor, "B H K D"], Float[Tensor, "B H K N"] | None]:
    """The means of tokens that slots read, in float32, and the attention, or None where it is not wanted.

    As `slot_attention(readers, tokens[:, None], tokens[:, None], ..., bias=bias, scale=1)`, in four launches. A second
    derivative takes plain operations. Tokens may have any strides; `why_not` says what the kernels cannot take.
    """
    bias = None if bias is None else bias.float().contiguous()
    masks = (None if one is None else one.contiguous() for one in (mask, slot_mask))
    means, _, attention = torch.ops.narrows.slot_read(
        tokens, readers.to(tokens.dtype), bias, *masks, joint_heads, float(eps), with_attention
    )
    return means, attention if with_attention else None


@register_flop_formula(torch.ops.narrows.slot_read)
def _flops(tokens: torch.Size, readers: torch.Size, *_: Any, **__: Any) -> int:
    """Two products: of every token with every row, and of every weight with every token."""
    return 4 * readers[:3].numel() * tokens[1] * tokens[2]


@register_flop_formula(torch.ops.narrows.slot_read_backward)
def _backward_flops(tokens: torch.Size, readers: torch.Size, *others: Any, **__: Any) -> int:
    """Both passes make logits and their gradients anew, two products, which count, as in attention's backward."""
    of_tokens, of_readers = others[-1]
    return (8 * of_tokens + 6 * of_readers) * readers[:3].numel() * tokens[1] * tokens[2]
