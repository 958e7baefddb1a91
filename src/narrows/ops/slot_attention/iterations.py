"""All iterations of slot attention on a GPU: two launches each, one that reads and one that updates the slots."""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.slot_attention import update
from narrows.ops.slot_attention.common import Settings, Weights, gradients_of, read
from narrows.ops.slot_attention.triton import Read, aligned, on_device_of


class Sizes(NamedTuple):
    """Of a call, as the kernels name them: B samples, K slots, H heads of width E, tokens of width D, or W aligned.

    Slots are S wide, the MLP's hidden layer M, and what the recurrent cell takes in U.
    """

    B: int
    K: int
    H: int
    D: int
    W: int
    S: int
    E: int
    M: int
    U: int

    @classmethod
    def of(cls, slots: Tensor, weights: Weights, heads: int) -> "Sizes":
        (inner, dim), (batch, number, width) = weights.key.shape, slots.shape
        hidden, update = weights.expand.shape[0], weights.input.shape[1]
        return cls(batch, number, heads, dim, dim + -dim % 16, width, inner // heads, hidden, update)

    @property
    def rows(self) -> int:
        return self.B * self.K

    @property
    def programs(self) -> int:
        return -(-self.rows // update.ROWS)

    def kept(self) -> list[int]:
        """Values, mapped heads, hidden layer, what it takes in, what queries are made of, shifted means, queries."""
        return [self.H * self.E, self.S, self.M, self.S, self.S, self.H * self.W, self.H * self.E]

    def made(self) -> list[int]:
        """Gradients of queries, readers, values, mapped heads, new slots, hidden layer, gates; and the old slots."""
        heads = self.H * self.E
        return [heads, self.H * self.W, heads, self.S, self.S, self.M, 6 * self.S, self.S]

    def summed(self) -> dict[str, int]:
        """Gradients of vectors but the gain and shift of tokens."""
        heads, width = self.H * self.E, self.S
        return {
            "key_bias": heads,
            "value_bias": heads,
            "out_bias": width,
            "input_bias": 3 * width,
            "state_bias": 3 * width,
            "mlp_gain": width,
            "mlp_shift": width,
            "expand_bias": self.M,
            "contract_bias": width,
            "slot_gain": width,
            "slot_shift": width,
            "query_bias": heads,
        }


def _row_of(widths: list[int]) -> int:
    """How long a row of parts is that each begin at a multiple of 16."""
    return sum(width + -width % 16 for width in widths)


def _parts_of(rows: Tensor, widths: list[int]) -> list[Tensor]:
    """The parts of rows `[..., _row_of(widths)]`."""
    padded = [width + -width % 16 for width in widths]
    return [part[..., :width] for part, width in zip(rows.split(padded, -1), widths, strict=True)]


def _gradients_of_weights(
    weights: Weights, sizes: Sizes, kept: Tensor, made: Tensor, summed: Tensor, of_norm: Tensor
) -> list[Tensor]:
    """Of those there are, in their order, dtype and layout: one product for each matrix, one sum for all vectors."""
    values, outs, hidden, normed, asked, shifted, queries = _parts_of(kept.flatten(0, 1), sizes.kept())
    of_queries, of_readers, of_values, of_outs, of_new, of_hidden, gates, old = _parts_of(
        made.flatten(0, 1), sizes.made()
    )

    def by_head(grad: Tensor, rows: Tensor) -> Tensor:
        grad, rows = (x.unflatten(1, (sizes.H, -1)).transpose(0, 1) for x in (grad, rows))
        return (grad.mT @ rows[..., : sizes.D]).flatten(0, 1)

    gated = 3 * sizes.S
    matrices = {
        "key": by_head(queries, of_readers),
        "value": by_head(of_values, shifted),
        "input": gates[:, :gated].mT @ (values if weights.out is None else outs),
        "state": gates[:, gated:].mT @ old,
        "expand": of_hidden.mT @ normed,
        "contract": of_new.mT @ hidden,
        "query": of_queries.mT @ asked,
    }
    if weights.out is not None:
        matrices["out"] = of_outs.mT @ values
    of_norm, summed = of_norm.sum((0, 1, 2, 3)), summed.sum((0, 1))
    in_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in {weight.dtype for weight in weights if weight is not None}:
        of_tokens, of_slots = of_norm.to(dtype), summed.to(dtype).split(list(sizes.summed().values()))
        named = zip(("gain", "shift", *sizes.summed()), (*of_tokens, *of_slots), strict=True)
        in_dtype[dtype] = dict(named)
    named = ((name, weight.dtype) for name, weight in weights._asdict().items() if weight is not None)
    return [
        matrices[name].to(dtype).contiguous() if name in matrices else in_dtype[dtype][name] for name, dtype in named
    ]


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
                new if t == iterations else between[was], cells[was], kept[was], kept[now], readers[now], bias[now],
                *given, sizes.rows, *sizes[1:3], chunks, *sizes[3:], kept.shape[2], scale, eps, mlp_eps, slot_eps,
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
        tokens.new_empty(iterations, sizes.rows, _row_of(sizes.kept())),
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
                parts, part_bias, carry, scratch, between[was] if 0 < t < iterations else slots,
                slots if t < 2 else between[t - 2], means[was], totals[was], cells[was], kept[was], kept[now],
                made[was], made[now], summed[was], summed[now], of_norm[was], of_norm[now], of_means[was], centres[was],
                *(getattr(given, name) for name in update.OF_BACKWARD), sizes.rows, *sizes[1:3], chunks, *sizes[3:],
                kept.shape[2], made.shape[2], summed.shape[2], scale, mlp_eps, slot_eps,
                HAS_READ=t > 0, READS_ON=t < iterations, **update.tiling(tokens.dtype),
            )  # fmt: skip
        if t > 0:
            of_last = grad_attention if t == iterations else None
            rows = readers[was], bias[was], of_means[was], centres[was], totals[was]
            parts, part_bias = task.backward_rows(*rows, of_last)
            chunks = parts.shape[1]
    if with_tokens:
        found = task.backward_tokens(readers, bias, of_means, centres, totals, grad_attention)
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
        tokens.new_empty(iterations, sizes.rows, _row_of(sizes.made())),
        tokens.new_empty(*programs, sum(sizes.summed().values()), dtype=torch.float32),
        tokens.new_empty(*programs, 2, sizes.H, 2, sizes.D, dtype=torch.float32),
    )


def _unpacked(weights: list[Tensor], present: list[bool]) -> Weights:
    rest = iter(weights)
    return Weights(*(next(rest) if there else None for there in present))  # pyright: ignore[reportArgumentType]


def _plain(
    tokens: Tensor, slots: Tensor, weights: Weights, mask: Tensor | None, slot_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, which can be differentiated twice."""
    low, heads, w = tokens.dtype, (settings.heads, -1), weights
    w = Weights(*(None if weight is None else weight.to(low) for weight in weights))  # pyright: ignore[reportArgumentType]
    key, value = w.key.unflatten(0, heads), w.value.unflatten(0, heads)
    empty = tokens.new_ones(1) if tokens.shape[1] else tokens.new_zeros(1)
    some = (empty if mask is None else mask.any(1).to(low))[:, None, None, None]
    for _ in range(settings.iterations):
        normed = F.layer_norm(slots.to(low), slots.shape[-1:], w.slot_gain, w.slot_shift, settings.slot_eps)
        queries = F.linear(normed, w.query, w.query_bias).unflatten(-1, heads).transpose(1, 2)
        readers = queries @ key
        bias = torch.zeros_like(readers[..., 0]) if w.shift is None else (readers * w.shift).sum(-1)
        if w.key_bias is not None:
            bias = bias + (queries * w.key_bias.unflatten(0, heads)[:, None]).sum(-1)
        readers = (readers if w.gain is None else readers * w.gain) * settings.scale
        options = settings.joint_heads, settings.eps
        keys = tokens[:, None]
        means, attention = read(readers, bias.float() * settings.scale, keys, None, mask, slot_mask, *options, low)
        means = means if w.gain is None else means * w.gain
        means = means if w.shift is None else means + w.shift * some
        values = means @ value.mT
        values = values if w.value_bias is None else values + w.value_bias.unflatten(0, heads)[:, None] * some
        values = values.transpose(1, 2).flatten(2)
        values = values if w.out is None else F.linear(values, w.out, w.out_bias)
        cell = w.input, w.state, w.input_bias, w.state_bias
        state = torch.gru_cell(values.flatten(0, 1), slots.to(low).flatten(0, 1), *cell).view_as(slots)
        normed = F.layer_norm(state, state.shape[-1:], w.mlp_gain, w.mlp_shift, settings.mlp_eps)
        hidden = F.linear(normed, w.expand, w.expand_bias).relu()
        slots = (state + F.linear(hidden, w.contract, w.contract_bias)).to(slots.dtype)
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
    grads = _gradients_of_weights(weights, sizes, saved[4], made, summed, of_norm)
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
