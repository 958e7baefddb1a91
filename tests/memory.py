"""Peak memory on a GPU, exact on every machine: what a call allocates, counted on fake tensors.

Nothing is computed. What an operation needs inside itself, and how an allocator rounds, is not seen.
"""

import heapq
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from narrows.measure import peak_memory
from tests.launches import fused_attention, replace_by_fakes


def peak_on_a_gpu(
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module, torch.device], Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
) -> int:
    """Greatest number of bytes allocated at one time, beyond the parameters.

    Args:
        make: makes the module, anywhere.
        call: runs it on inputs that it makes on the device it is given.
        dtype: of the parameters.
        backward: with gradients of all that asks for one, which are part of the memory; without gradients otherwise.
    """
    module, device = make(), torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(), fused_attention():
        warnings.simplefilter("ignore")
        replace_by_fakes(module, device, dtype)

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    call(module, device)
                return
            with _released_by_node() as used:
                output = call(module, device)
                _backward(output, torch.empty_like(output), used)

        return peak_memory(run)


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


@contextmanager
def _released_by_node() -> Iterator[list[_Saved]]:
    """Lists what was read of the tensors kept for the backward pass, so that it can be released, as autograd does."""
    used: list[_Saved] = []

    def unpack(saved: _Saved) -> Tensor:
        used.append(saved)
        assert saved.tensor is not None
        return saved.tensor

    with saved_tensors_hooks(lambda tensor: _Saved(tensor.detach()), unpack):
        yield used


def _backward(output: Tensor, gradient: Tensor, used: list[_Saved]) -> None:
    """`output.backward(gradient)`, node by node in autograd's order; its own engine asks for a GPU that is there."""
    root: Any = output.grad_fn
    awaited, found, unseen = Counter[Any](), {root}, [root]
    while unseen:
        for child, _ in unseen.pop().next_functions:
            awaited[child] += 1
            if child is not None and child not in found:
                found.add(child)
                unseen.append(child)
    received: dict[Any, dict[int, Tensor]] = {root: {0: gradient}}
    del output, gradient
    order = count()
    ready = [(0, next(order), root)]
    while ready:
        _, _, node = heapq.heappop(ready)
        given = received.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, given.pop(0))
            continue
        arguments = [given.pop(index, None) for index in range(len(node._input_metadata))]
        with torch.no_grad():
            made = node.apply(*arguments) if hasattr(node, "apply") else node(*arguments)
        del arguments
        made = list(made) if isinstance(made, tuple) else [made]
        for saved in used:
            saved.tensor = None
        used.clear()
        for position, (child, index) in enumerate(node.next_functions):
            if child is None:
                continue
            part, made[position] = made[position], None
            if part is not None:
                like = child.variable if hasattr(child, "variable") else child._input_metadata[index]
                part = part.sum_to_size(*like.shape).to(like.dtype)
                inbox = received.setdefault(child, {})
                inbox[index] = inbox[index] + part if index in inbox else part
            del part
            awaited[child] -= 1
            if not awaited[child]:
                late = -(2**62) if hasattr(child, "variable") else -child._sequence_nr()
                heapq.heappush(ready, (late, next(order), child))


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Keeps the gradient itself where it lies in memory as the parameter does, and a copy otherwise."""
    if gradient.stride() != leaf.stride():
        gradient = torch.empty_like(leaf).copy_(gradient)
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
