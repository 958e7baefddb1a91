"""The backward pass of fake tensors on a GPU, which autograd's own engine refuses: it asks for a GPU that is there."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()


_read: list[_Saved] = []  # by the node that runs


def _unpack(saved: _Saved) -> Tensor:
    _read.append(saved)
    assert saved.tensor is not None
    return saved.tensor


def run_backward(forward: Callable[[], Sequence[Tensor]]) -> None:
    """Run `forward` and the backward pass of what it returns: node by node, in autograd's order.

    What was saved for a node is released once the node has run, and gradients of leaves stay in their `grad`, as
    autograd does it. A node may ask `torch.autograd.grad` for gradients of leaves.
    """
    with (
        saved_tensors_hooks(_Saved, _unpack),
        patch.object(torch.autograd, "grad", _grad),
        patch.object(FunctionCtx, "set_materialize_grads", _set_materialize_grads),
    ):
        outputs = forward()
        _walk(outputs, [torch.empty_like(output) for output in outputs], _accumulate)


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = value  # which cannot be read
    ctx.takes_none = not value


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any, *, create_graph: bool = False, allow_unused: bool = False
) -> tuple[Tensor | None, ...]:
    assert not create_graph
    outputs, inputs, given = (
        [part] if isinstance(part, Tensor) else list(part) for part in (outputs, inputs, grad_outputs)
    )
    found: dict[int, Tensor] = {}

    def keep(leaf: Tensor, gradient: Tensor) -> None:
        found[id(leaf)] = gradient

    outer = list(_read)
    _read.clear()
    _walk(outputs, given, keep)
    _read.extend(outer)
    assert allow_unused or all(id(leaf) in found for leaf in inputs)
    return tuple(found.get(id(leaf)) for leaf in inputs)


def _walk(outputs: Sequence[Tensor], given: list[Tensor], take: Callable[[Tensor, Tensor], None]) -> None:
    """From `outputs` with their gradients, which are released on the way, to the leaves, which `take` theirs."""
    received: dict[Any, dict[int, Tensor]] = {}
    for output in outputs:
        received.setdefault(output.grad_fn, {})[output.output_nr] = given.pop(0)
    awaited, unseen, order = Counter[Any](), list(received), count()
    found = set(unseen)
    while unseen:
        for child, _ in unseen.pop().next_functions:
            awaited[child] += 1
            if child is not None and child not in found:
                found.add(child)
                unseen.append(child)
    ready: list[Any] = []
    for root in received:
        if not awaited[root]:
            heapq.heappush(ready, (_turn(root), next(order), root))
    while ready:
        _, _, node = heapq.heappop(ready)
        inbox = received.pop(node, {})
        if hasattr(node, "variable"):
            if inbox:
                take(node.variable, inbox.pop(0))
            continue
        made = _run(node, [inbox.pop(index, None) for index in range(len(node._input_metadata))])
        for saved in _read:
            saved.tensor = None
        _read.clear()
        for child, index in node.next_functions:
            if child is None:
                continue
            part = made.pop(0)
            if part is not None:
                like = child.variable if hasattr(child, "variable") else child._input_metadata[index]
                part = part.sum_to_size(like.shape).to(like.dtype)
                inbox = received.setdefault(child, {})
                inbox[index] = inbox[index] + part if index in inbox else part
            del part
            awaited[child] -= 1
            if not awaited[child]:
                heapq.heappush(ready, (_turn(child), next(order), child))


def _turn(node: Any) -> int:
    """Leaves first, then what ran last."""
    return -(2**62) if hasattr(node, "variable") else -node._sequence_nr()


def _run(node: Any, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Of each input that has a gradient that of it, or None."""
    if all(gradient is None for gradient in gradients):
        return [None] * len(node.next_functions)
    in_python = hasattr(node, "apply")
    with torch.no_grad():
        if in_python and not getattr(node, "takes_none", False):
            places = zip(gradients, node._input_metadata, strict=True)
            gradients = [
                torch.zeros(like.shape, dtype=like.dtype, device=like.device) if given is None else given
                for given, like in places
            ]
        made = node.apply(*gradients) if in_python else node(*gradients)
    made = made if isinstance(made, tuple) else (made,)
    # A function in Python has inputs that are no tensors, too.
    children = [child is not None for child, _ in node.next_functions]
    needed = node.needs_input_grad if in_python else children
    found = [part for part, need in zip(made, needed, strict=True) if need]
    assert len(found) == sum(children)
    return found


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Keeps the gradient itself where it lies in memory as the parameter does, and a copy otherwise."""
    if gradient.stride() != leaf.stride():
        gradient = torch.empty_like(leaf).copy_(gradient)
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
