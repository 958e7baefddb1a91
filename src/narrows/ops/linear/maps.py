"""One linear map of many tokens, and one with a GELU after it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.ops.linear import onednn, processor
from narrows.ops.linear.stacked import DILATION, FEWEST_ROWS, stacked_linear

# Of maps with fewer weights than this, BLAS is the quicker one.
FEWEST_WEIGHTS = 2**17
# The same where BLAS has to read its result once more for the GELU, and how many numbers that has to be.
FEWEST_WEIGHTS_BEFORE_GELU = 2**15 if processor.MKL_IS_BEHIND else 0
FEWEST_ACTIVATIONS = 2**17
# With fewer tokens than this, bringing the weights into the order of a convolution costs more than the product.
FEWEST_CONVOLVED = 128
# With fewer tokens than that, a weight of as many numbers is worth changing roles with the tokens.
LARGE_WEIGHT = 2**20


def linear(
    tokens: Float[Tensor, "*layout D"], weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*layout out"]:
    """`torch.nn.functional.linear(tokens, weight, bias)`."""
    if processor.convolves(tokens):
        return _convolution(tokens, weight, bias)
    ahead = processor.MKL_IS_BEHIND and processor.chooses(tokens) and weight.numel() >= FEWEST_WEIGHTS
    return onednn.linear(tokens, weight, bias) if ahead and onednn.can_run() else F.linear(tokens, weight, bias)


def linear_gelu(
    tokens: Float[Tensor, "*layout D"], weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*layout out"]:
    """`torch.nn.functional.gelu(linear(tokens, weight, bias))`.

    Where nothing is to be trained, oneDNN applies the GELU to what it still has at hand.
    """
    fuses = processor.chooses(tokens) and not torch.is_grad_enabled() and onednn.can_run()
    if fuses and weight.numel() >= FEWEST_WEIGHTS_BEFORE_GELU and _has_many_activations(tokens, weight):
        return onednn.linear(tokens, weight, bias, gelu=True)
    return F.gelu(linear(tokens, weight, bias))


def _has_many_activations(tokens: Tensor, weight: Tensor) -> bool:
    # Asked of a compiler, that would tie the graph to the number of tokens.
    return torch.compiler.is_compiling() or tokens.shape[:-1].numel() * weight.shape[0] >= FEWEST_ACTIVATIONS


def _convolution(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map is a convolution with filters of one pixel, and convolutions run in oneDNN.

    Many tokens are a channels-last image of width 1, the rows of the weight its filters. Of few tokens and a large
    weight, the weight is the image (`stacked_linear`).
    """
    num_tokens = tokens.shape[:-1].numel()
    if FEWEST_ROWS <= num_tokens < FEWEST_CONVOLVED and weight.numel() >= LARGE_WEIGHT:
        mapped = stacked_linear(tokens.flatten(0, -2)[None], weight[:, None], None if bias is None else bias[None])
        return mapped[0].contiguous().unflatten(0, tokens.shape[:-1])
    if num_tokens < FEWEST_CONVOLVED or tokens.ndim < 3:
        return F.linear(tokens, weight, bias)
    images = tokens.flatten(0, -3).unsqueeze(2).permute(0, 3, 1, 2)  # [images, D, n, 1], channels last
    mapped = F.conv2d(images, weight[:, :, None, None], bias, dilation=DILATION)
    return mapped.squeeze(3).transpose(1, 2).unflatten(0, tokens.shape[:-2])
