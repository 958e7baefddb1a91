"""The rules of precision and differentiation, in one place: which dtype is computed in, which kernels may run.

Products with many tokens run in `compute_dtype`. References, softmax statistics and whatever is summed over many tokens
run in float32 or, where an input is float64, in float64. Autocast never lowers float64. And where a derivative is asked
for that a kernel does not have (`is_transformed`), plain operations take its place.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# Asked beforehand, since torch 2.11 does not trace the question.
_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "mps", "xpu", "meta")}


def has_autocast(device: str) -> bool:
    """Whether there is autocast on devices of this type."""
    return _AUTOCAST[device] if device in _AUTOCAST else torch.amp.is_autocast_available(device)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which `tensor` is multiplied: autocast's where that is on, its own otherwise; float64 stays."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not has_autocast(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where any of `tensors` is: what sums, softmax and references are computed in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is where it is float64 already."""
    return tensor.to(accumulation_dtype(tensor))


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not touch operations on the device of `tensor`."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transformation of `torch.func` or forward-mode differentiation is at work on any of `tensors`.

    What has its own `autograd.Function`, or calls a kernel that has no such derivatives, takes plain operations then.
    """
    if torch.compiler.is_compiling():  # Compilers trace through transformations by themselves.
        return False
    return any(
        torch.func.debug_unwrap(tensor, recurse=False) is not tensor or unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )
