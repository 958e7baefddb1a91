"""What a call asks of a GPU, found on a machine without one: kernels launched, numbers copied from the host, waits.

Nothing is computed: tensors are fake, with a shape, a dtype and the device "cuda". An eager program launches about one
kernel for each operation that is not a view, and each costs the host 10 to 25 microseconds, so that at usual sizes
their number is the speed. Kernels of ours count one each where `torch.library` knows them with a fake implementation.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import narrows.ops.attention
from tests.fake_autograd import run_backward

# Name storage, or give storage another name; no kernel runs.
FREE = {"_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"}
FREE |= {"new_empty_strided", "squeeze_"}

Call = Callable[[nn.Module, torch.device], Any]


class Launches(TorchDispatchMode):
    """Counts, as long as it is entered.

    Attributes:
        operations: how many of each kind, by name.
        copies: operations that read a tensor of the host for a result on the GPU. It cannot be captured as a CUDA
            graph and waits for the GPU. A single number, a tensor without axes, travels along with the launch.
        waits: operations that bring a result from the GPU to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []
        self.waits: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or func.namespace == "prim" or name in FREE:
            return result
        given, made = _devices((args, kwargs), scalars="copy" in name), _devices(result)
        if "cuda" in made and "cpu" in given:
            self.copies.append(name)
        if made == {"cpu"} and "cuda" in given:
            self.waits.append(name)
        self.operations[name] += 1
        return result


def launches(
    make: Callable[[], nn.Module],
    call: Call,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    backward: bool = False,
    nested: bool = True,
) -> Launches:
    """What a call launches, without gradients, or, with `backward`, with its backward pass.

    PyTorch's autograd asks for a real GPU, and so the tensors of a backward pass are fake ones of the CPU: operations
    are those of the implementation that is chosen there, and copies from the host are not seen. Where no backward of
    ours calls autograd itself (`nested=False`), an engine of the tests' own runs it on a fake GPU.

    Args:
        make: makes the module, on the CPU, where it may compute what it likes.
        call: makes inputs on the device it is given and runs the module.
        dtype: of the parameters; None as they come.
        backward: whether gradients are taken of the outputs.
        nested: whether a backward pass may call autograd.

    Raises:
        DataDependentOutputException, DynamicOutputShapeException: a value is read back, as by `.item()`, or decides a
            shape, as with `nonzero` or a boolean index: the host would wait for the GPU.
    """
    module, device = make(), torch.device("cpu" if backward and nested else "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replace_by_fakes(module, device, dtype)
        with torch.set_grad_enabled(backward), Launches() as found, fused_attention():
            if backward and not nested:
                run_backward(lambda: _learned(call(module, device)))
            elif backward:
                learned = _learned(call(module, device))
                torch.autograd.backward(learned, [torch.empty_like(value) for value in learned])
            else:
                call(module, device)
    return found


def replace_by_fakes(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    fake = torch.empty_like(tensor, dtype=kind, device=device)
                    held[name] = nn.Parameter(fake, tensor.requires_grad) if held is part._parameters else fake


def _learned(outputs: Any) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.requires_grad]


def _devices(values: Any, *, scalars: bool = True) -> set[str]:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, Tensor) and (value.ndim or scalars)}


class _OneKernel(torch.autograd.Function):
    """One launch forward and one backward, with the shapes of attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.new_ones(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        return torch.ones_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _OneKernel.apply(query, key, value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Counts fused attention as the one kernel it is on a GPU; for fake tensors PyTorch would choose a formula."""
    name = "scaled_dot_product_attention"
    with patch.object(F, name, _attention), patch.object(narrows.ops.attention, name, _attention):
        yield
