"""The backward pass of fake tensors on a GPU, which autograd's own engine refuses: it asks for a GPU that is there."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()


def run_backward(forward: Callable[[], Sequence[Tensor]]) -> None:
    """Run `forward` and the backward pass of what it returns: node by node, in autograd's order.

    What was saved for a node is released once the node has run, and gradients of leaves stay in their `grad`, as
    autograd does it.
    """
    read: list[_Saved] = []

    def unpack(saved: _Saved) -> Tensor:
        read.append(saved)
        assert saved.tensor is not None
        return saved.tensor

    with saved_tensors_hooks(_Saved, unpack):
        outputs = forward()
    received: dict[Any, dict[int, Tensor]] = {}
    for output in outputs:
        received.setdefault(output.grad_fn, {})[output.output_nr] = torch.empty_like(output)
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
        given = received.pop(node, {})
        if hasattr(node, "variable"):
            if given:
                _accumulate(node.variable, given.pop(0))
            continue
        made = _run(node, [given.pop(index, None) for index in range(len(node._input_metadata))])
        for saved in read:
            saved.tensor = None
        read.clear()
        for position, (child, index) in enumerate(node.next_functions):
            part, made[position] = made[position], None
            if child is None:
                continue
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
    with torch.no_grad():
        if all(gradient is None for gradient in gradients):
            return [None] * len(node.next_functions)
        made = node.apply(*gradients) if hasattr(node, "apply") else node(*gradients)
    return list(made) if isinstance(made, tuple) else [made]


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Keeps the gradient itself where it lies in memory as the parameter does, and a copy otherwise."""
    if gradient.stride() != leaf.stride():
        gradient = torch.empty_like(leaf).copy_(gradient)
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
