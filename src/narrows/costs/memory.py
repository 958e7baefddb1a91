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
    are freed, which is exact and reproducible, but does not see scratch space inside an operation, nor inside loops and
    `flex_attention`; compiled modules are tracked as they run eagerly.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with torch.compiler.set_stance("force_eager"), _Allocations() as allocations:
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

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], list[int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "higher_order" and func.name() == "cond":
            predicate, if_true, if_false, operands = args
            with self:
                return (if_true if predicate else if_false)(*operands)
        if torch.is_inference_mode_enabled() and func.namespace != "higher_order":
            # In inference mode composite operations are not decomposed; their inner allocations count too.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = _storages((args, kwargs))
        for storage in given:
            self._follow(storage, size=0)
        before = [storage.nbytes() for storage in given]
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._follow(storage, size=storage.nbytes())
        for storage, size in zip(given, before, strict=True):  # `resize_` and `out=` change what was given
            self._grow(storage, storage.nbytes() - size)
        self.peak = max(self.peak, self.current)
        return result

    def _follow(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        held = [size]

        def freed(_: weakref.ref[UntypedStorage]) -> None:
            self.current -= held[0]
            del self._known[key]

        self.current += size
        self._known[key] = weakref.ref(storage, freed), held

    def _grow(self, storage: UntypedStorage, size: int) -> None:
        self._known[storage._cdata][1][0] += size
        self.current += size


def _storages(tree: Any) -> list[UntypedStorage]:
    """The distinct storages of all tensors; of a sparse one, those of its indices and values."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    dense = [part for tensor in tensors for part in _dense_parts(tensor)]
    return list({storage._cdata: storage for part in dense if (storage := part.untyped_storage())}.values())


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.values(), tensor.offsets()]  # pyright: ignore[reportAttributeAccessIssue]  # a nested tensor
