"""Precision rules that every reference keeps."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not touch operations on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)
