"""What tokens make of the slots they read: a recurrent cell, an MLP and a second cell, in one step."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.slot_attention.common import token_weights
from narrows.precision import at_least_float32, autocast_off, is_transformed


class Cell(NamedTuple):
    """A recurrent cell without the map of its input.

    Args:
        weight: of the state, `[3 * D, D]`, for reset, update and new, as in `nn.GRUCell`.
        bias: `[3 * D]`: of input and state together for reset and update, of the state alone for new.
        new_bias: `[D]`, of the input for new.
    """

    weight: Tensor
    bias: Tensor | None
    new_bias: Tensor | None


class TokenUpdate(NamedTuple):
    """The weights with which tokens update themselves, all in the dtype of the tokens.

    Args:
        read: the cell that takes in what is read of the slots.
        norm_weight: gain of the MLP's LayerNorm, `[D]`.
        norm_bias: its bias, `[D]`.
        expand: the MLP's first map, `[M, D]`.
        expand_bias: its bias, `[M]`.
        contract: the MLP's second map, `[D, M]`; None where `inputs` holds it.
        contract_bias: its bias, `[D]`; None where the bias of `write` holds it.
        inputs: the second cell's map of its input, `[3 * D, D]`; `[3 * D, M]` with `contract` in it.
        write: the second cell.
    """

    read: Cell
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    contract: Tensor | None
    contract_bias: Tensor | None
    inputs: Tensor
    write: Cell


class Reading(NamedTuple):
    """How tokens read slots.

    Args:
        mask: `[B, N]`, True at real tokens.
        slot_mask: `[B, K]`, True at real slots.
        scale: of the logits.
        normalization: over what the weights sum to 1, "slots" or "tokens".
        eps: added to the softmax before it is divided by its sum over the tokens.
        readers_eps: of the tokens' LayerNorm.
        mlp_eps: of the MLP's LayerNorm.
    """

    mask: Tensor | None
    slot_mask: Tensor | None
    scale: float
    normalization: str
    eps: float
    readers_eps: float
    mlp_eps: float


def update_tokens(
    tokens: Float[Tensor, "B N D"],
    readers: Float[Tensor, "B K D"],
    reader_bias: Float[Tensor, "B K"],
    gates: Float[Tensor, "B K G"],
    weights: TokenUpdate,
    reading: Reading,
    *,
    normalized: Float[Tensor, "B N D"] | None = None,
) -> Float[Tensor, "B N D"]:
    r"""Tokens after they have read the slots and passed the MLP.

    \[ x \leftarrow \mathrm{GRU}(\textstyle\sum_k P_{kn} g_k, x), \quad
       x \leftarrow \mathrm{GRU}'(\mathrm{MLP}(x), x) \]

    with P the softmax over the slots of \(s (r_k \hat x_n + b_k)\), normalised as in `read_slots`, and \(\hat x\) the
    tokens normalised, without gain and bias. Keeps for backward 8 D + M numbers of a token: the states, 3 D numbers of
    either cell, and what the MLP expands. Twice differentiable.

    Args:
        tokens: x, which is the state of the cells.
        readers: r, the slots' keys after the transposed map of the tokens' queries.
        reader_bias: b.
        gates: g, `[B, K, 3 * D]`, the slots' values after the first cell's map of its input, without its bias.
        weights: of cells and MLP.
        reading: masks and numbers.
        normalized: \(\hat x\), where it is known already.
    """
    flat = (*weights.read, *weights[1:-1], *weights.write)
    inputs = (tokens, readers, reader_bias, gates, *flat)
    with autocast_off(tokens):
        if torch.compiler.is_compiling() or is_transformed(*(x for x in inputs if x is not None)):
            return _update(reading, *inputs)
        normalized = None if normalized is None else normalized.detach()
        return _Update.apply(reading, normalized, *inputs)  # pyright: ignore[reportReturnType]


def _update(reading: Reading, *inputs: Any) -> Tensor:
    """The formula in plain operations."""
    tokens, readers, reader_bias, gates, *flat = inputs
    weights, normalized = _unflatten(flat), _normalize(tokens, reading)
    read = _weights(_logits(normalized, readers, reader_bias, reading), reading).mT.to(tokens.dtype)
    state = step(weights.read, read, gates, tokens)
    hidden = F.layer_norm(state, state.shape[-1:], weights.norm_weight, weights.norm_bias, reading.mlp_eps)
    hidden = _contract(weights, F.linear(hidden, weights.expand, weights.expand_bias).relu())
    return step(weights.write, hidden, weights.inputs.mT, state)


def step(cell: Cell, left: Tensor, right: Tensor, state: Tensor) -> Tensor:
    """The next state of a cell, the product of whose input is `left @ right`."""
    size = 2 * state.shape[-1]
    of_state = F.linear(state, cell.weight, cell.bias)
    reset, keep = (of_state[..., :size] + _product(left, right[..., :size])).sigmoid().chunk(2, -1)
    new = _product(left, right[..., size:], cell.new_bias)
    return torch.lerp(torch.tanh(new + reset * of_state[..., size:]), state, keep)


class _Update(torch.autograd.Function):
    """Keeps of either cell its state and what the state gave, and computes all else again in backward."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, normalized: Tensor | None, *inputs: Any) -> Tensor:
        ctx.reading = reading
        tokens, readers, reader_bias, gates, *flat = inputs
        weights = _unflatten(flat)
        normalized = _normalize(tokens, reading) if normalized is None else normalized
        read = _weights(_logits(normalized, readers, reader_bias, reading), reading).mT.to(tokens.dtype)
        first = _of_state(weights.read, read, gates, tokens)
        state = torch.lerp(_new(weights.read, first, read, gates), tokens, first.chunk(3, -1)[1])
        expanded = F.layer_norm(state, state.shape[-1:], weights.norm_weight, weights.norm_bias, reading.mlp_eps)
        expanded = F.linear(expanded, weights.expand, weights.expand_bias).relu_()
        hidden = _contract(weights, expanded)
        second = _of_state(weights.write, hidden, weights.inputs.mT, state)
        ctx.save_for_backward(first, state, expanded, second, *inputs)
        return torch.lerp(_new(weights.write, second, hidden, weights.inputs.mT), state, second.chunk(3, -1)[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), reading, needed = gradients, ctx.reading, ctx.needs_input_grad[2:]
        first, state, expanded, second, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            inputs = [None if x is None else x.view_as(x) for x in inputs]  # one may depend on another
            asked = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
            found = iter(torch.autograd.grad(_update(reading, *inputs), asked, grad, create_graph=True))
            return None, None, *(next(found) if need else None for need in needed)
        tokens, readers, reader_bias, gates, *flat = inputs
        weights = _unflatten(flat)
        grad, of_mlp = _mlp_backward(weights, second, expanded, state, grad, reading.mlp_eps)
        dim = tokens.shape[-1]

        leaf = tokens.detach().requires_grad_()
        with torch.enable_grad():
            normalized = _normalize(leaf, reading)
        logits = _logits(normalized.detach(), readers, reader_bias, reading).requires_grad_()
        with torch.enable_grad():
            read = _weights(logits, reading)
        left = read.detach().to(tokens.dtype)
        sums, grad, of_cell = _cell_backward(weights.read, first, left.mT, gates, tokens, grad)
        new, both = sums[..., :dim], sums[..., dim : 3 * dim]
        of_read = (gates[..., 2 * dim :] @ new.mT).baddbmm_(gates[..., : 2 * dim], both.mT)
        of_gates = torch.cat([left @ both, left @ new], -1)
        del sums, new, both
        (of_logits,) = torch.autograd.grad(read, logits, of_read.to(read.dtype))
        of_bias = of_logits.sum(-1, dtype=at_least_float32(of_logits).dtype) * reading.scale
        of_logits = of_logits * reading.scale
        grad += torch.autograd.grad(normalized, leaf, of_logits.mT @ readers)[0]
        of_inputs = (grad, of_logits @ normalized.detach(), of_bias.to(reader_bias.dtype), of_gates)
        return None, None, *of_inputs, *of_cell, *of_mlp


def _mlp_backward(
    weights: TokenUpdate, second: Tensor, expanded: Tensor, state: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradients of the state between the cells, and of all weights after the first cell."""
    hidden = _contract(weights, expanded)
    sums, of_state, of_cell = _cell_backward(weights.write, second, hidden, weights.inputs.mT, state, grad)
    dim, rows = state.shape[-1], sums.flatten(0, -2)
    new, both = rows[:, :dim], rows[:, dim : 3 * dim]
    of_inputs = torch.cat([both.mT @ hidden.flatten(0, -2), new.mT @ hidden.flatten(0, -2)])
    of_hidden = (new @ weights.inputs[2 * dim :]).addmm_(both, weights.inputs[: 2 * dim])
    del sums, rows, new, both
    of_contract = of_contract_bias = None
    if weights.contract is not None:
        of_contract = of_hidden.mT @ expanded.flatten(0, -2)
        of_contract_bias = None if weights.contract_bias is None else of_hidden.sum(0)
        of_hidden = of_hidden @ weights.contract
    of_hidden *= expanded.flatten(0, -2) > 0
    leaves = [None if x is None else x.detach().requires_grad_() for x in (state, *weights[1:3])]
    with torch.enable_grad():
        normed = F.layer_norm(leaves[0], state.shape[-1:], *leaves[1:], eps)  # pyright: ignore[reportCallIssue, reportArgumentType]
    of_expand = of_hidden.mT @ normed.detach().flatten(0, -2)
    of_expand_bias = None if weights.expand_bias is None else of_hidden.sum(0)
    of_normed = (of_hidden @ weights.expand).view_as(state)
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(normed, asked, of_normed))
    of_norm = [None if leaf is None else next(found) for leaf in leaves]
    of_state += of_norm[0]  # pyright: ignore[reportOperatorIssue]
    return of_state, (*of_norm[1:], of_expand, of_expand_bias, of_contract, of_contract_bias, of_inputs, *of_cell)


def _cell_backward(
    cell: Cell, of_state: Tensor, left: Tensor, right: Tensor, state: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of new, reset, update, and the state's part of new beside one another; of the state; of the cell.

    With the next state (1 - z) n + z h, n = tanh(i + r s), s the state's part of new:

        dn = (1 - z) (1 - n^2) g,   dr = r (1 - r) s dn,   dz = z (1 - z) (h - n) g,   ds = r dn
    """
    reset, keep, part = of_state.chunk(3, -1)
    sums = grad.new_empty(*grad.shape[:-1], 4 * grad.shape[-1])
    of_new, of_reset, of_keep, of_part = sums.chunk(4, -1)
    new = _new(cell, of_state, left, right, out=of_new)
    torch.sub(state, new, out=of_keep).mul_(grad).mul_(keep).addcmul_(of_keep, keep, value=-1)
    torch.addcmul(grad, grad, keep, value=-1, out=of_reset)
    torch.addcmul(of_reset, of_reset, new.square_(), value=-1, out=of_new)
    torch.mul(of_new, reset, out=of_part)
    torch.mul(of_part, part, out=of_reset).addcmul_(of_reset, reset, value=-1)
    rows, dim = sums.flatten(0, -2), state.shape[-1]
    of_product = rows[:, dim:]
    of_previous = grad * keep
    of_previous.flatten(0, -2).addmm_(of_product, cell.weight)
    of_weight = of_product.mT @ state.flatten(0, -2)
    of_bias = None if cell.bias is None else of_product.sum(0)
    return sums, of_previous, (of_weight, of_bias, None if cell.new_bias is None else rows[:, :dim].sum(0))


def _normalize(tokens: Tensor, reading: Reading) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=reading.readers_eps)


def _contract(weights: TokenUpdate, expanded: Tensor) -> Tensor:
    return expanded if weights.contract is None else F.linear(expanded, weights.contract, weights.contract_bias)


def _logits(normalized: Tensor, readers: Tensor, reader_bias: Tensor, reading: Reading) -> Tensor:
    bias, scale = reader_bias[..., None].to(readers.dtype), reading.scale
    return torch.baddbmm(bias, readers, normalized.mT, beta=scale, alpha=scale)


def _weights(logits: Tensor, reading: Reading) -> Tensor:
    """`[B, K, N]` in float32 or better."""
    masks = reading.mask, reading.slot_mask
    return token_weights(logits, *masks, normalization=reading.normalization, eps=reading.eps)


def _of_state(cell: Cell, left: Tensor, right: Tensor, state: Tensor) -> Tensor:
    """Reset, update, and the state's part of new, beside one another; the product of the input is `left @ right`."""
    size = 2 * state.shape[-1]
    product = F.linear(state, cell.weight, cell.bias)
    both = product[..., :size]
    if right.ndim == 3:
        both.baddbmm_(left, right[..., :size])
    else:
        both.flatten(0, 1).addmm_(left.flatten(0, 1), right[..., :size])
    both.sigmoid_()
    return product


def _new(cell: Cell, of_state: Tensor, left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """What is new, written to `out`."""
    reset, _, part = of_state.chunk(3, -1)
    new = part.new_empty(part.shape) if out is None else out
    rows, right = new, right[..., 2 * part.shape[-1] :]
    if right.ndim == 2:
        rows, left = new.flatten(0, -2), left.flatten(0, -2)
    if cell.new_bias is None:
        torch.matmul(left, right, out=rows)
    else:
        (torch.addmm if right.ndim == 2 else torch.baddbmm)(cell.new_bias, left, right, out=rows)
    return new.addcmul_(reset, part).tanh_()


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right + bias`; the same `right` for every sample is a linear map."""
    if right.ndim == 2:
        return F.linear(left, right.mT, bias)
    return left @ right if bias is None else torch.baddbmm(bias, left, right)


def _unflatten(flat: Any) -> TokenUpdate:
    return TokenUpdate(Cell(*flat[:3]), *flat[3:-3], Cell(*flat[-3:]))  # pyright: ignore[reportCallIssue]
