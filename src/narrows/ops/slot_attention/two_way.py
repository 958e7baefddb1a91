"""All iterations of two-way slot attention on a GPU: in each a kernel that reads, and one each for slots and tokens."""

# What Triton compiles has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from narrows.ops.slot_attention import token_kernels, update
from narrows.ops.slot_attention.common import (
    Settings,
    TwoWaySettings,
    Weights,
    gradients_of,
    iterate_once,
    token_weights,
)
from narrows.ops.slot_attention.common import update as update_plainly
from narrows.ops.slot_attention.rows import Sizes, in_order, matrices_of, row_of, unpacked
from narrows.ops.slot_attention.triton import Read, aligned, on_device_of

FORWARD = ("input_bias", "state", "state_bias", "mlp_gain", "mlp_shift", "expand", "expand_bias", "contract")
FORWARD += ("contract_bias", "last_input", "last_state", "last_input_bias", "last_state_bias")
BACKWARD = tuple(name for name in FORWARD if name not in ("expand_bias", "contract_bias"))
OF_SLOTS = ("gain", "shift", "key", "key_bias", "value", "value_bias", "input", "slot_gain", "slot_shift", "query")
OF_SLOTS += ("query_bias",)
OF_SLOTS_BACKWARD = ("gain", "key", "value", "input", "slot_gain", "slot_shift", "query", "query_bias")


def _of(weights: Weights, names: tuple[str, ...]) -> list[Tensor | None]:
    return [getattr(weights, name) for name in names]


def _sides(weights: list[Tensor], present: list[bool]) -> tuple[Weights, Weights]:
    """Of slots and of tokens."""
    found, number = unpacked(weights, present), len(Weights._fields)
    return Weights(*found[:number]), Weights(*found[number:])  # pyright: ignore[reportArgumentType]


def _standardised(tokens: Tensor, eps: float) -> Tensor:
    return aligned(F.layer_norm(tokens, tokens.shape[-1:], eps=eps))


class _Tokens(NamedTuple):
    """What kernels of tokens take besides weights: D wide, hidden layer M, tiles of a sample."""

    N: int
    D: int
    W: int
    K: int
    M: int
    tiles: int
    constants: dict[str, int]

    @classmethod
    def of(cls, tokens: Tensor, sizes: Sizes, other: Weights, *, backward: bool = False) -> "_Tokens":
        constants = token_kernels.tiling(sizes.K, tokens.dtype, backward=backward)
        tiles = triton.cdiv(tokens.shape[1], constants["BLOCK_N"])
        return cls(tokens.shape[1], sizes.D, sizes.W, sizes.K, other.expand.shape[0], tiles, constants)


@torch.library.custom_op("narrows::two_way_iterations", mutates_args=())
@on_device_of
def _two_way_iterations(
    tokens: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    present: list[bool],
    mask: Tensor | None,
    slot_mask: Tensor | None,
    keep: bool,
    iterations: int,
    over_tokens: bool,
    scale: float,
    token_scale: float,
    eps: float,
    norm_eps: float,
    mlp_eps: float,
    slot_eps: float,
    read_eps: float,
    token_mlp_eps: float,
) -> list[Tensor]:
    """The last slots, tokens and attention; and for backward, of each iteration, what `_empty` says."""
    (given, other), last = _sides(weights, present), iterations - 1
    sizes = Sizes.of(slots, given, two_way=True)
    made = _empty(tokens, slots, sizes, other, iterations, keep)
    new, out, attention, between, readers, bias, means, totals, kept, cells, gates, *of_tokens = made
    passed, states, hidden, contracted = of_tokens if keep else (tokens, *_states(tokens, other, 1))
    normed, shape = _standardised(tokens, norm_eps), _Tokens.of(tokens, sizes, other)
    task = Read(normed, mask, slot_mask, 1, sizes.K, False, eps)
    if not over_tokens:
        totals[:, 1].fill_(1)
    sums, parts, chunks, options = means, totals, 1, update.tiling(tokens.dtype)
    for t in range(iterations + 1):
        was, now = max(t - 1, 0), min(t, last)  # of what has been read, and of what reads next
        if sizes.rows:
            update._forward[(sizes.programs,)](
                sums, parts, means[was], totals[was, 0], slots if t < 2 else between[t - 2],
                new if t in (0, iterations) else between[was], cells[was], kept[was], kept[now],
                readers[now, 0], bias[now, 0], readers[was, 1], bias[was, 1], gates[was],
                *given, *_of(other, OF_SLOTS), sizes.rows, sizes.K, 1, chunks, *sizes.widths, kept.shape[2],
                scale, token_scale, eps, mlp_eps, slot_eps, read_eps,
                HAS_READ=t > 0, READS_ON=t < iterations, **options,
            )  # fmt: skip
        if t > 0 and shape.tiles * sizes.B:
            over = task.forward(readers[was, 1], bias[was, 1], None)[1] if over_tokens else None
            at, after = was if keep else 0, passed[was] if keep and t < iterations else out
            token_kernels._forward[(sizes.B * shape.tiles,)](
                tokens, normed, readers[was, 1], bias[was, 1], gates[was], over, totals[was, 1], mask, slot_mask,
                *_of(other, FORWARD), states[at], hidden[at], contracted[at], after, *shape[:-1],
                1 if over is None else over.shape[1], eps, token_mlp_eps, norm_eps,
                READS_ON=t < iterations, **shape.constants,
            )  # fmt: skip
            tokens = after
        if t < iterations:
            sums, parts = task.forward(readers[t, 0], bias[t, 0], attention if t == last else None)
            chunks = sums.shape[1]
    return made


@_two_way_iterations.register_fake
def _(tokens: Tensor, slots: Tensor, weights: list[Tensor], present: list[bool], *options: Any) -> list[Tensor]:
    given, other = _sides(weights, present)
    return _empty(tokens, slots, Sizes.of(slots, given, two_way=True), other, options[3], options[2])


def _empty(tokens: Tensor, slots: Tensor, sizes: Sizes, other: Weights, iterations: int, keep: bool) -> list[Tensor]:
    """Slots, tokens, attention; slots between iterations; of each readers of slots and of tokens, their bias, means,
    totals, rows kept, cells, gates; where they are kept, tokens between iterations, between cells, and of their MLP.
    """
    both = iterations, 2, sizes.B, sizes.K
    one = torch.float32
    return [
        torch.empty_like(slots, memory_format=torch.contiguous_format),
        torch.empty_like(tokens),
        slots.new_empty(sizes.B, 1, sizes.K, tokens.shape[1]),
        slots.new_empty(iterations - 1, *slots.shape),
        tokens.new_empty(*both, sizes.W),
        tokens.new_empty(both, dtype=one),
        tokens.new_empty(iterations, sizes.B, sizes.K, sizes.W, dtype=one),
        tokens.new_empty(both, dtype=one),
        tokens.new_empty(iterations, sizes.rows, row_of(sizes.kept())),
        tokens.new_empty(iterations, sizes.rows, 9 * sizes.S, dtype=one),
        tokens.new_empty(iterations, sizes.B, sizes.K, 3 * sizes.D),
        tokens.new_empty(iterations - 1 if keep else 0, *tokens.shape),
        *_states(tokens, other, iterations if keep else 0),
    ]


def _states(tokens: Tensor, other: Weights, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens between their cells, the hidden layer of their MLP, and what it makes."""
    hidden = tokens.new_empty(number, *tokens.shape[:2], other.expand.shape[0])
    return tokens.new_empty(number, *tokens.shape), hidden, tokens.new_empty(number, *tokens.shape)


@torch.library.custom_op("narrows::two_way_iterations_backward", mutates_args=())
@on_device_of
def _two_way_iterations_backward(
    tokens: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    present: list[bool],
    mask: Tensor | None,
    slot_mask: Tensor | None,
    saved: list[Tensor],
    grad: Tensor | None,
    grad_tokens: Tensor | None,
    grad_attention: Tensor | None,
    iterations: int,
    over_tokens: bool,
    scale: float,
    token_scale: float,
    eps: float,
    norm_eps: float,
    mlp_eps: float,
    slot_eps: float,
    read_eps: float,
    token_mlp_eps: float,
) -> list[Tensor]:
    """Gradients of tokens and first slots; rows and sums that give those of weights, see `_empty_backward`."""
    new, between, readers, bias, means, totals, kept, cells, gates, passed, states, hidden, contracted = saved
    given, other = _sides(weights, present)
    sizes = Sizes.of(slots, given, two_way=True)
    shape = _Tokens.of(tokens, sizes, other, backward=True)
    of_slots, carry, made, summed, of_norm, sums, *matrices = result = _empty_backward(tokens, sizes, other, iterations)
    for start, found in ((of_slots, grad), (carry, grad_tokens)):
        if found is None:
            start.zero_()
        else:
            start.copy_(found)
    of_state, of_last_input, of_last_state, of_contract, of_expand = matrices
    # Of a read of the tokens by slots and one of slots by tokens; the latter has no means of tokens.
    of_means, centres = torch.zeros_like(readers[0]), torch.zeros_like(bias[0])
    of_read, scratch = tokens.new_empty(2, sizes.B, sizes.K, shape.N, dtype=torch.float32), torch.empty_like(of_slots)
    if grad_attention is not None:
        of_read[0] = grad_attention[:, 0]
    read = tokens.new_empty(sizes.B, sizes.K, shape.N)
    parted = tokens.new_empty(sizes.B, shape.tiles, sizes.K, dtype=torch.float32)
    of_cell, of_last = (tokens.new_empty(*tokens.shape[:2], 4 * sizes.D) for _ in range(2))
    of_contracted, unit, of_between = (torch.empty_like(carry) for _ in range(3))
    of_hidden, options = torch.empty_like(hidden[0]), update.tiling(tokens.dtype)
    parts, part_bias, chunks = means, totals, 1
    token_parts, token_bias, token_chunks, of_gates = means, totals, 1, gates
    state, statistics, task = tokens, [], None
    for t in reversed(range(iterations + 1)):
        was, now = max(t - 1, 0), min(t, iterations - 1)
        if t > 0:
            state = passed[t - 2] if t > 1 else tokens
            normed, *statistics = torch.native_layer_norm(state, tokens.shape[-1:], None, None, norm_eps)
            task = Read(aligned(normed), mask, slot_mask, 1, sizes.K, False, eps)
            if shape.tiles * sizes.B:
                token_kernels._backward[(sizes.B * shape.tiles,)](
                    state, task.tokens, readers[was, 1], bias[was, 1], gates[was],
                    totals[was, 1] if over_tokens else None, mask, slot_mask, states[was], hidden[was],
                    contracted[was], carry, *_of(other, BACKWARD), of_cell, of_last, of_contracted, of_hidden, unit,
                    of_between, read, of_read[1], parted, sums[was], *shape[:-1], eps, token_mlp_eps,
                    **shape.constants,
                )  # fmt: skip
            if over_tokens:
                torch.sum(parted, 1, out=centres[1])
            before = 0.0 if t == iterations else 1.0
            for matrix, left, right in (
                (of_state, of_cell[..., sizes.D :], state),
                (of_last_input, of_last[..., : 3 * sizes.D], contracted[was]),
                (of_last_state, of_last[..., sizes.D :], states[was]),
                (of_contract, of_contracted, hidden[was]),
                (of_expand, of_hidden, unit),
            ):
                matrix.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1), beta=before)
            token_parts, token_bias = task.backward_rows(
                readers[was, 1], bias[was, 1], of_means[1], centres[1], totals[was, 1], of_read[1]
            )
            token_chunks = token_parts.shape[1]
            of_gates = read @ of_cell[..., : 3 * sizes.D]
        if sizes.rows:
            update._backward[(sizes.programs,)](
                parts, part_bias, token_parts, token_bias, of_gates, of_slots, scratch,
                slots if t == 0 else new if t == iterations else between[was], slots if t < 2 else between[t - 2],
                means[was], totals[was, 0], cells[was], kept[was], kept[now], made[was], made[now],
                summed[was], summed[now], of_norm[was], of_norm[now], of_means[0], centres[0],
                *update.of_backward(given), *_of(other, OF_SLOTS_BACKWARD), sizes.rows, sizes.K, 1, chunks,
                token_chunks, *sizes.widths, kept.shape[2], made.shape[2], summed.shape[2],
                scale, token_scale, mlp_eps, slot_eps, read_eps, HAS_READ=t > 0, READS_ON=t < iterations, **options,
            )  # fmt: skip
        if t > 0 and task is not None:
            graded = t == iterations and grad_attention is not None
            parts, part_bias = task.backward_rows(
                readers[was, 0], bias[was, 0], of_means[0], centres[0], totals[was, 0], of_read[0] if graded else None
            )
            chunks = parts.shape[1]
            of_reads = of_read if graded else of_read[1:]
            of_normed = task.backward_tokens(readers[was], bias[was], of_means, centres, totals[was], of_reads)
            carry += torch.ops.aten.native_layer_norm_backward(
                of_normed[..., : sizes.D], state, tokens.shape[-1:], *statistics, None, None, [True, False, False]
            )[0]
    return result


def _empty_backward(tokens: Tensor, sizes: Sizes, other: Weights, iterations: int) -> list[Tensor]:
    """Gradients of slots and tokens; rows, sums of rows, and those for gain and shift of tokens; sums of tokens.

    And of the matrices of tokens, those of `last_input` with the candidate's rows first.
    """
    programs, one, (hidden, dim) = (iterations, sizes.programs), torch.float32, other.expand.shape
    tiles = sizes.B * _Tokens.of(tokens, sizes, other, backward=True).tiles
    square = 3 * dim, dim
    return [
        tokens.new_empty(sizes.B, sizes.K, sizes.S, dtype=one),
        torch.empty_like(tokens),
        tokens.new_empty(iterations, sizes.rows, row_of(sizes.made())),
        tokens.new_empty(*programs, sum(sizes.summed().values()), dtype=one),
        tokens.new_empty(*programs, 2, 2, dim, dtype=one),
        tokens.new_empty(iterations, tiles, 15 * dim + hidden, dtype=one),
        *(tokens.new_empty(size) for size in (square, square, square, (dim, hidden), (hidden, dim))),
    ]


@_two_way_iterations_backward.register_fake
def _(tokens: Tensor, slots: Tensor, weights: list[Tensor], present: list[bool], *options: Any) -> list[Tensor]:
    given, other = _sides(weights, present)
    return _empty_backward(tokens, Sizes.of(slots, given, two_way=True), other, options[6])


def _plain(
    tokens: Tensor,
    slots: Tensor,
    sides: tuple[Weights, Weights],
    mask: Tensor | None,
    slot_mask: Tensor | None,
    numbers: TwoWaySettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain operations, which can be differentiated twice."""
    low = tokens.dtype
    w, o = (Weights(*(None if x is None else x.to(low) for x in side)) for side in sides)  # pyright: ignore[reportArgumentType]
    settings = Settings(1, 1, False, numbers.scale, numbers.eps, numbers.mlp_eps, numbers.slot_eps)
    normalization, width = "tokens" if numbers.over_tokens else "slots", tokens.shape[-1:]
    for _ in range(numbers.iterations):
        normed = F.layer_norm(tokens, width, eps=numbers.norm_eps)
        slots, attention = iterate_once(normed, slots, w, mask, slot_mask, settings)
        read = F.layer_norm(slots.to(low), slots.shape[-1:], o.gain, o.shift, numbers.read_eps)
        keys, values = F.linear(read, o.key, o.key_bias), F.linear(read, o.value, o.value_bias)
        queries = F.linear(
            F.layer_norm(tokens, width, o.slot_gain, o.slot_shift, numbers.norm_eps), o.query, o.query_bias
        )
        options = {"normalization": normalization, "eps": numbers.eps}
        weights = token_weights(numbers.token_scale * keys @ queries.mT, mask, slot_mask, **options)
        tokens = update_plainly(weights.mT.to(low) @ values, tokens, o, numbers.token_mlp_eps)
    return slots, tokens, attention[:, :1].to(slots.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tokens, slots, weights, ctx.present, mask, slot_mask, _, *numbers = inputs
    new, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.numbers = TwoWaySettings(*numbers)
    ctx.save_for_backward(tokens, slots, mask, slot_mask, new, *kept, *weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tokens, slots, mask, slot_mask, *rest = ctx.saved_tensors
    saved, given, numbers = rest[:13], rest[13:], ctx.numbers
    if torch.is_grad_enabled():  # to be differentiated once more

        def plain(tokens: Tensor, slots: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            return _plain(tokens, slots, _sides([*given], ctx.present), mask, slot_mask, numbers)

        found = gradients_of(plain, (tokens, slots, *given), grads[:3])
        return *found[:2], found[2:], *[None] * 14
    weights, other = _sides(given, ctx.present)
    sizes = Sizes.of(slots, weights, two_way=True)
    of_slots, of_tokens, made, summed, of_norm, sums, *matrices = torch.ops.narrows.two_way_iterations_backward(
        tokens, slots, given, ctx.present, mask, slot_mask, saved, *grads[:3], *numbers
    )
    names = ("state", "last_input", "last_state", "contract", "expand")
    of_matrices = {f"tokens.{name}": matrix for name, matrix in zip(names, matrices, strict=True)}
    of_matrices["tokens.last_input"] = of_matrices["tokens.last_input"].roll(-sizes.D, 0)
    hidden, dim = other.expand.shape
    widths = {"input_bias": 3 * dim, "state_bias": 3 * dim, "mlp_gain": dim, "mlp_shift": dim, "expand_bias": hidden}
    widths |= {"contract_bias": dim, "last_input_bias": 3 * dim, "last_state_bias": 3 * dim}
    widths = {f"tokens.{name}": width for name, width in widths.items()}
    vectors = (
        (of_norm.sum((0, 1, 2)).flatten(), {"gain": sizes.D, "shift": sizes.D}),
        (summed.sum((0, 1)), sizes.summed()),
        (sums.sum((0, 1)), widths),
    )
    named = weights._asdict() | {f"tokens.{name}": weight for name, weight in other._asdict().items()}
    there = {name: weight for name, weight in named.items() if weight is not None}
    found = in_order(there, of_matrices | matrices_of(weights, sizes, saved[6], made), vectors)
    return of_tokens, of_slots.to(slots.dtype), found, *[None] * 14


_two_way_iterations.register_autograd(_backward, setup_context=_keep)


def iterate(
    tokens: Float[Tensor, "B N D"],
    slots: Float[Tensor, "B K S"],
    weights: tuple[Weights, Weights],
    settings: TwoWaySettings,
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B 1 K N"]]:
    """What `narrows.ops.slot_attention.iterate_both` says."""
    masks = (None if one is None else one.contiguous() for one in (mask, slot_mask))
    flat = [weight for side in weights for weight in side]
    given = [weight.contiguous() for weight in flat if weight is not None]
    inputs = tokens.contiguous(), slots.contiguous()
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *given))
    new, tokens, attention, *_ = torch.ops.narrows.two_way_iterations(
        *inputs, given, [weight is not None for weight in flat], *masks, keep, *settings
    )
    return new, tokens, attention


@register_flop_formula(torch.ops.narrows.two_way_iterations)
def _flops(
    tokens: torch.Size, slots: torch.Size, weights: list[torch.Size], present: list[bool], *others: Any, **__: Any
) -> int:
    """In each iteration what slots and tokens read, and each matrix times each slot or token once.

    With weights over the tokens, these are read once more for their sums.
    """
    iterations, over_tokens = others[3:5]
    of_slots, of_tokens = _matrices(weights, present)
    reads = 2 + 4 + 2 * over_tokens
    rows, matrices = slots[:2].numel(), tokens[:2].numel() * sum(of_tokens)
    return 2 * iterations * (rows * (reads * tokens[1:].numel() + sum(of_slots)) + matrices)


@register_flop_formula(torch.ops.narrows.two_way_iterations_backward)
def _backward_flops(
    tokens: torch.Size, slots: torch.Size, weights: list[torch.Size], present: list[bool], *others: Any, **__: Any
) -> int:
    """In each iteration the way back through all that, and what is made anew, as in attention's backward.

    Tokens multiply with all slots 14 times for the gradients of both reads, and 1 + 3 + 3 + 3 times for those of the
    gates; cells are made again. Gradients of the slots' matrices are products of PyTorch's.
    """
    of_slots, of_tokens = _matrices(weights, present)
    given, other = _sides(weights, present)  # type: ignore[arg-type]
    anew = given.key.numel() + other.query.numel()
    cells = of_tokens[0] + sum(of_tokens[3:])
    rows, matrices = slots[:2].numel(), tokens[:2].numel() * (2 * sum(of_tokens) + cells)
    return 2 * others[6] * (rows * (24 * tokens[1:].numel() + sum(of_slots) + anew) + matrices)


def _matrices(weights: list[torch.Size], present: list[bool]) -> tuple[list[int], list[int]]:
    """How many numbers the matrices have that multiply slots, and those that multiply tokens."""
    given, other = (side._asdict() for side in _sides(weights, present))  # type: ignore[arg-type]
    sizes = {name: size.numel() for name, size in other.items() if size is not None and len(size) == 2}
    of_tokens = [sizes.pop(name) for name in ("state", "expand", "contract", "last_input", "last_state")]
    of_slots = [size.numel() for size in given.values() if size is not None and len(size) == 2]
    return [*of_slots, *sizes.values()], of_tokens
