"""A linear map of every token of every window, by the quickest kernel there is for it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def project(
    windows: Float[Tensor, "*windows D"], weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*windows out"]:
    """`torch.nn.functional.linear(windows, weight, bias)`.

    Windows are small channels-last images, and a 1x1 convolution of them is the same map. In float32 on a CPU, PyTorch
    hands convolutions to oneDNN and linear maps to BLAS; on AMD processors MKL's BLAS takes 1.6 times as long.
    """
    convolved = windows.device.type == "cpu" and windows.dtype == torch.float32 and windows.ndim > 2
    if not convolved or torch.compiler.is_compiling():  # compilers choose for themselves
        return F.linear(windows, weight, bias)
    images = windows.flatten(0, -3).unsqueeze(2).permute(0, 3, 1, 2)  # [windows, D, n, 1], channels last
    projected = F.conv2d(images, weight[:, :, None, None], bias)
    return projected.squeeze(3).transpose(1, 2).unflatten(0, windows.shape[:-2])
