"""Memory: the peak of a function, and what it keeps for the backward pass."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Saved:
    """A tensor that autograd saves; it is detached, since it lives as long as the graph and must not hold it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_for_backward(function: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of what `function` returns.

    Tensors that share a storage count once, with the whole of it. What an `autograd.Function` holds other than through
    `save_for_backward` is not seen.

    Args:
        function: runs the forward pass and returns what a loss would be computed from.
        exclude: tensors that are alive anyway, such as parameters and inputs; their views are not counted either.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        box = _Saved(tensor.detach())
        saved.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        output = function()
    storages = [box.tensor.untyped_storage() for box in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output
    for tensor in exclude:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Greatest number of bytes that `function` has allocated at one time, beyond those at its start.

    On CUDA the allocator reports it. On other devices tensors are tracked from the operation that makes them until they
    are freed, which is exact and reproducible, but does not see scratch space inside an operation.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with _Allocations() as allocations:
            function()
        return allocations.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Allocations(TorchDispatchMode):
    """Tracks every storage from the operation that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # In inference mode composite operations are not decomposed; their inner allocations count too.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, size=0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, size=tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.current)
        return result

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: weakref.ref[UntypedStorage]) -> None:
            self.current -= size
            del self._known[key]

        self.current += size
        self._known[key] = weakref.ref(storage, freed)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
