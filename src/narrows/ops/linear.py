"""A linear map of many tokens, by the quickest kernel there is for it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# With fewer tokens than this, bringing the weights into oneDNN's order costs more than the product.
FEWEST_CONVOLVED = 128


def linear(
    tokens: Float[Tensor, "*layout D"], weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*layout out"]:
    """`torch.nn.functional.linear(tokens, weight, bias)`.

    Tokens are a channels-last image of width 1, and a 1x1 convolution of it is the same map. In float32 on a CPU,
    PyTorch hands convolutions to oneDNN and linear maps to BLAS; on AMD processors MKL's BLAS takes twice as long.
    """
    convolved = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and tokens.ndim > 2
    # Compilers choose for themselves.
    if not convolved or torch.compiler.is_compiling() or tokens.numel() < FEWEST_CONVOLVED * tokens.shape[-1]:
        return F.linear(tokens, weight, bias)
    images = tokens.flatten(0, -3).unsqueeze(2).permute(0, 3, 1, 2)  # [images, D, n, 1], channels last
    mapped = F.conv2d(images, weight[:, :, None, None], bias)
    return mapped.squeeze(3).transpose(1, 2).unflatten(0, tokens.shape[:-2])
