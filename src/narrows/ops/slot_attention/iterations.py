"""All iterations of slot attention on a GPU: two launches each, one that reads and one that updates the slots."""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.slot_attention import update
from narrows.ops.slot_attention.common import Settings, Weights, gradients_of, iterate_once
from narrows.ops.slot_attention.rows import Sizes, in_order, matrices_of, row_of, unpacked
from narrows.ops.slot_attention.triton import Read, aligned, on_device_of


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The last slots and attention; and for backward, of each iteration, what `_empty` says."""
    given, last = _unpacked(weights, present), iterations - 1
    sizes = Sizes.of(slots, given, heads)
    new, attention, between, readers, bias, means, totals, kept, cells = made = _empty(tokens, slots, sizes, iterations)
    task = Read(aligned(tokens), mask, slot_mask, heads, sizes.K, joint_heads, eps)
    sums, parts, chunks = means, totals, 1
    for t in range(iterations + 1):
        was, now = max(t - 1, 0), min(t, last)  # of what has been read, and of what reads next
        if sizes.rows:
            update._forward[(sizes.programs,)](
                sums, parts, means[was], totals[was], slots if t < 2 else between[t - 2],
                new if t in (0, iterations) else between[was], cells[was], kept[was], kept[now],
                readers[now], bias[now], *[None] * 3, *given, *[None] * 11, sizes.rows, sizes.K, heads, chunks,
                *sizes.widths, kept.shape[2], scale, 1.0, eps, mlp_eps, slot_eps, 1.0,
                HAS_READ=t > 0, READS_ON=t < iterations, **update.tiling(tokens.dtype),
            )  # fmt: skip
        if t < iterations:
            sums, parts = task.forward(readers[t], bias[t], attention if t == last else None)
            chunks = sums.shape[1]
    return made


@_slot_iterations.register_fake
def _(tokens: Tensor, slots: Tensor, weights: list[Tensor], present: list[bool], *options: Any) -> tuple[Tensor, ...]:
    return _empty(tokens, slots, Sizes.of(slots, _unpacked(weights, present), options[3]), options[2])


def _empty(
    tokens: Tensor, slots: Tensor, sizes: Sizes, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots, attention, slots between iterations; readers, their bias, means, totals, rows kept, cells of each."""
    shape = iterations, sizes.B, sizes.H, sizes.K
    return (
        torch.empty_like(slots, memory_format=torch.contiguous_format),
        slots.new_empty(sizes.B, sizes.H, sizes.K, tokens.shape[1]),
        slots.new_empty(iterations - 1, *slots.shape),
        tokens.new_empty(*shape, sizes.W),
        tokens.new_empty(shape, dtype=torch.float32),
        tokens.new_empty(*shape, sizes.W, dtype=torch.float32),
        tokens.new_empty(shape, dtype=torch.float32),
        tokens.new_empty(iterations, sizes.rows, row_of(sizes.kept())),
        tokens.new_empty(iterations, sizes.rows, 5 * sizes.S, dtype=torch.float32),
    )


@torch.library.custom_op("narrows::slot_iterations_backward", mutates_args=())
@on_device_of
def _slot_iterations_backward(
    tokens: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    present: list[bool],
    mask: Tensor | None,
    slot_mask: Tensor | None,
    between: Tensor,
    read: list[Tensor],
    grad: Tensor | None,
    grad_attention: Tensor | None,
    with_tokens: bool,
    joint_heads: bool,
    scale: float,
    eps: float,
    mlp_eps: float,
    slot_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens and first slots; rows and sums that give those of weights, see `Sizes`."""
    readers, bias, means, totals, kept, cells = read
    iterations, _, heads = readers.shape[:3]
    given = _unpacked(weights, present)
    sizes = Sizes.of(slots, given, heads)
    of_tokens, carry, made, summed, of_norm = empty = _empty_backward(tokens, sizes, iterations, with_tokens)
    if grad is None:
        carry.zero_()
    else:
        carry.copy_(grad)
    task = Read(aligned(tokens), mask, slot_mask, heads, sizes.K, joint_heads, eps)
    of_means, centres, scratch = torch.empty_like(readers), torch.empty_like(bias), torch.empty_like(carry)
    parts, part_bias, chunks = means, totals, 1
    for t in reversed(range(iterations + 1)):
        was, now = max(t - 1, 0), min(t, iterations - 1)
        if sizes.rows:
            update._backward[(sizes.programs,)](
                parts, part_bias, *[None] * 3, carry, scratch, between[was] if 0 < t < iterations else slots,
                slots if t < 2 else between[t - 2], means[was], totals[was], cells[was], kept[was], kept[now],
                made[was], made[now], summed[was], summed[now], of_norm[was], of_norm[now], of_means[was], centres[was],
                *update.of_backward(given), *[None] * 8, sizes.rows, sizes.K, heads, chunks, 1, *sizes.widths,
                kept.shape[2], made.shape[2], summed.shape[2], scale, 1.0, mlp_eps, slot_eps, 1.0,
                HAS_READ=t > 0, READS_ON=t < iterations, **update.tiling(tokens.dtype),
            )  # fmt: skip
        if t > 0:
            of_last = grad_attention if t == iterations else None
            rows = readers[was], bias[was], of_means[was], centres[was], totals[was]
            parts, part_bias = task.backward_rows(*rows, of_last)
            chunks = parts.shape[1]
    if with_tokens:
        of_last = None if grad_attention is None else grad_attention[None]
        found = task.backward_tokens(readers, bias, of_means, centres, totals, of_last)
        of_tokens = found if found.shape == tokens.shape else found[..., : sizes.D].contiguous()
    return of_tokens, *empty[1:]


@_slot_iterations_backward.register_fake
def _(tokens: Tensor, slots: Tensor, weights: list[Tensor], present: list[bool], *options: Any) -> tuple[Tensor, ...]:
    iterations, _, heads = options[3][0].shape[:3]
    sizes = Sizes.of(slots, _unpacked(weights, present), heads)
    return _empty_backward(tokens, sizes, iterations, options[6])


def _empty_backward(
    tokens: Tensor, sizes: Sizes, iterations: int, with_tokens: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of tokens, empty if not wanted; of slots; rows, sums of rows, and those for gain and shift of tokens."""
    programs = iterations, sizes.programs
    return (
        tokens.new_empty(tokens.shape if with_tokens else (0,)),
        tokens.new_empty(sizes.B, sizes.K, sizes.S, dtype=torch.float32),
        tokens.new_empty(iterations, sizes.rows, row_of(sizes.made())),
        tokens.new_empty(*programs, sum(sizes.summed().values()), dtype=torch.float32),
        tokens.new_empty(*programs, 2, sizes.H, 2, sizes.D, dtype=torch.float32),
    )


def _unpacked(weights: list[Tensor], present: list[bool]) -> Weights:
    return Weights(*unpacked(weights, present))  # pyright: ignore[reportArgumentType]


def _plain(
    tokens: Tensor, slots: Tensor, weights: Weights, mask: Tensor | None, slot_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, which can be differentiated twice."""
    low = Weights(*(None if weight is None else weight.to(tokens.dtype) for weight in weights))  # pyright: ignore[reportArgumentType]
    for _ in range(settings.iterations):
        slots, attention = iterate_once(tokens, slots, low, mask, slot_mask, settings)
    return slots, attention.to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, slots, weights, ctx.present, mask, slot_mask, *numbers = inputs
    _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.settings = Settings(*numbers)
    ctx.save_for_backward(tokens, slots, mask, slot_mask, *kept, *weights)


def _backward(ctx: Any, grad: Tensor | None, grad_attention: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tokens, slots, mask, slot_mask, between, *rest = ctx.saved_tensors
    saved, given, settings = rest[:6], rest[6:], ctx.settings
    if torch.is_grad_enabled():  # to be differentiated once more

        def plain(tokens: Tensor, slots: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            return _plain(tokens, slots, _unpacked([*given], ctx.present), mask, slot_mask, settings)

        grads = gradients_of(plain, (tokens, slots, *given), (grad, grad_attention))
        return *grads[:2], grads[2:], *[None] * 10
    weights, sizes = _unpacked(given, ctx.present), Sizes.of(slots, _unpacked(given, ctx.present), settings.heads)
    grad_attention = None if grad_attention is None else grad_attention.contiguous()
    of_tokens, of_slots, made, summed, of_norm = torch.ops.narrows.slot_iterations_backward(
        tokens, slots, given, ctx.present, mask, slot_mask, between, saved, grad, grad_attention,
        ctx.needs_input_grad[0], *settings[2:],
    )  # fmt: skip
    named = {name: weight for name, weight in weights._asdict().items() if weight is not None}
    of_tokens_norm = of_norm.sum((0, 1, 2, 3)).flatten(), {"gain": sizes.D, "shift": sizes.D}
    vectors = of_tokens_norm, (summed.sum((0, 1)), sizes.summed())
    grads = in_order(named, matrices_of(weights, sizes, saved[4], made), vectors)
    return of_tokens if ctx.needs_input_grad[0] else None, of_slots.to(slots.dtype), grads, *[None] * 10


_slot_iterations.register_autograd(_backward, setup_context=_keep)


def iterate(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: Weights,
    settings: Settings,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B H K N"]]:
    """What `narrows.ops.slot_attention.iterate` says."""
    masks = (None if one is None else one.contiguous() for one in (mask, slot_mask))
    given = [weight.contiguous() for weight in weights if weight is not None]
    present = [weight is not None for weight in weights]
    new, attention, *_ = torch.ops.narrows.slot_iterations(
        tokens, slots.contiguous(), given, present, *masks, *settings
    )
    return new, attention


@register_flop_formula(torch.ops.narrows.slot_iterations)
def _flops(tokens: torch.Size, slots: torch.Size, weights: list[torch.Size], *others: Any, **__: Any) -> int:
    """In each iteration two products with all tokens, and each matrix times each slot once."""
    iterations, heads = others[3:5]
    matrices = sum(size.numel() for size in weights if len(size) == 2)
    return 2 * iterations * slots[:2].numel() * (2 * heads * tokens[1:].numel() + matrices)


@register_flop_formula(torch.ops.narrows.slot_iterations_backward)
def _backward_flops(tokens: torch.Size, slots: torch.Size, weights: list[torch.Size], *others: Any, **__: Any) -> int:
    """In each iteration three products with all tokens for readers, four for tokens, and each matrix times each slot.

    What is made anew counts, as in attention's backward: two products with all tokens either way, and readers without
    the gain of the tokens. Gradients of matrices are products of PyTorch's.
    """
    iterations, _, heads = others[4][0][:3]
    reads = 3 + 4 * others[7]
    key, *matrices = (size.numel() for size in weights if len(size) == 2)
    return 2 * iterations * slots[:2].numel() * (reads * heads * tokens[1:].numel() + 2 * key + sum(matrices))
