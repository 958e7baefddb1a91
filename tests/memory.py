"""Peak memory on a GPU, exact on every machine: what a call allocates, counted on fake tensors.

Nothing is computed. What an operation needs inside itself, and how an allocator rounds, is not seen.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrows.costs import peak_memory
from tests.fake_autograd import run_backward
from tests.launches import fused_attention, replace_by_fakes


def peak_on_a_gpu(
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module, torch.device], Tensor | Sequence[Tensor]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
) -> int:
    """Greatest number of bytes allocated at one time, beyond the parameters.

    Args:
        make: makes the module, anywhere.
        call: runs it on inputs that it makes on the device it is given, and returns what is learned from.
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
            run_backward(lambda: [found] if isinstance(found := call(module, device), Tensor) else list(found))

        return peak_memory(run)
