"""Linear maps of many tokens, by the quickest kernel there is for them.

In float32 on a CPU, PyTorch hands convolutions to oneDNN and products of matrices to BLAS. Where that is MKL and the
processor is an AMD Zen 5, which computes 512 bits at once, BLAS does without AVX-512 and takes twice as long. A linear
map is a convolution with filters of one pixel.
"""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# With fewer tokens than this, bringing the weights into oneDNN's order costs more than the product.
FEWEST_CONVOLVED = 128
# With fewer tokens than that, a weight of as many numbers is worth changing roles with the tokens.
LARGE_WEIGHT = 2**20
# Maps of fewer weights than this, and products with fewer rows, are quicker in BLAS.
FEWEST_WEIGHTS = 2**17
FEWEST_ROWS = 8
# Fewer filters than this take oneDNN longer than as many.
FEWEST_FILTERS = 32
# The first family of AMD's processors that computes 512 bits at once.
FIRST_WIDE_FAMILY = 26
# Filters of one pixel have nothing to dilate. But on a single thread, PyTorch keeps undilated ones from oneDNN.
DILATION = 2


def linear(
    tokens: Float[Tensor, "*layout D"], weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*layout out"]:
    """`torch.nn.functional.linear(tokens, weight, bias)`.

    Many tokens are a channels-last image of width 1, the rows of the weight its filters. Of few tokens and a large
    weight, the weight is the image (`stacked_linear`).
    """
    if not _convolves(tokens):
        return F.linear(tokens, weight, bias)
    num_tokens = tokens.shape[:-1].numel()
    if FEWEST_ROWS <= num_tokens < FEWEST_CONVOLVED and weight.numel() >= LARGE_WEIGHT:
        mapped = stacked_linear(tokens.flatten(0, -2)[None], weight[:, None], None if bias is None else bias[None])
        return mapped[0].contiguous().unflatten(0, tokens.shape[:-1])
    if num_tokens < FEWEST_CONVOLVED or tokens.ndim < 3:
        return F.linear(tokens, weight, bias)
    images = tokens.flatten(0, -3).unsqueeze(2).permute(0, 3, 1, 2)  # [images, D, n, 1], channels last
    mapped = F.conv2d(images, weight[:, :, None, None], bias, dilation=DILATION)
    return mapped.squeeze(3).transpose(1, 2).unflatten(0, tokens.shape[:-2])


def stacked_linear(
    rows: Float[Tensor, "E rows D"], weight: Float[Tensor, "out E D"], bias: Float[Tensor, "E out"] | None = None
) -> Float[Tensor, "E rows out"]:
    """E linear maps at once, `torch.nn.functional.linear(rows[e], weight[:, e], bias[e])` for every e.

    There are far more weights than rows, so that roles change: the weights are a channels-last image of `out` pixels,
    read as they lie in memory, and the rows are its filters, in E groups.
    """
    if not _convolves(rows):
        return _multiplied(rows, weight, bias)
    mapped = _StackedLinear.apply(rows, weight, bias)
    assert isinstance(mapped, Tensor)
    return mapped


class _StackedLinear(torch.autograd.Function):
    """Every product where it is quickest: those with the weights in oneDNN, the gradient of the rows in BLAS.

    What oneDNN computes lies in memory as weights do, `[out, E, rows]`, and is returned as a view of that.
    """

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_wide(weight) or rows.shape[1] < FEWEST_ROWS:
            return _multiplied(rows, weight, bias)
        groups = weight.shape[1]
        mapped = F.conv_transpose2d(_image(weight), _filters(rows), groups=groups, dilation=DILATION)
        mapped = mapped.squeeze(3).squeeze(0).unflatten(0, (groups, -1))[:, : rows.shape[1]]
        if rows.shape[1] < FEWEST_FILTERS:  # Do not keep what comes of the zeros.
            mapped = mapped.clone()
        return mapped if bias is None else mapped.add_(bias[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.bmm(grad, weight.transpose(0, 1))
            if rows.stride(-1) != 1:  # What comes next would read the one along and the other across.
                grad_rows = _features_first(grad_rows)
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(grad, rows) if _is_wide(weight) else torch.bmm(grad.mT, rows).transpose(0, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(1)
        return grad_rows, grad_weight, grad_bias


def _grad_weight(grad: Tensor, rows: Tensor) -> Tensor:
    """`[out, E, D]`, of the gradient `[E, rows, out]` as an image and the rows as its filters."""
    groups, filters = len(rows), _filters(rows)
    image = F.pad(_features_first(grad).permute(2, 0, 1), (0, filters.shape[1] - grad.shape[1]))
    products = F.conv2d(_image(image), filters, groups=groups, dilation=DILATION)
    return products.squeeze(3).squeeze(0).mT.unflatten(1, (groups, -1))


def _multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    maps = weight.permute(1, 2, 0)
    return torch.bmm(rows, maps) if bias is None else torch.baddbmm(bias[:, None], rows, maps)


def _is_wide(weight: Tensor) -> bool:
    return weight[:, 0].numel() >= FEWEST_WEIGHTS


def _convolves(tensor: Tensor) -> bool:
    """Whether oneDNN's convolutions are there for it, and quicker. Compilers choose for themselves."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and _is_blas_slow()
    )


@cache
def _is_blas_slow() -> bool:
    """Whether BLAS is MKL and keeps AVX-512 from a processor that would be twice as quick with it.

    Those are AMD's from family 26 on. Family 25 computes 512 bits in two halves, and before there is AVX2 and no more:
    there MKL is no slower.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    family = re.search(r"family\s*:?\s*(\d+)", text, re.IGNORECASE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= FIRST_WIDE_FAMILY


def _image(features: Tensor) -> Tensor:
    """`[out, E, n]` as an image `[1, E n, out, 1]`, channels last."""
    return features.flatten(1)[None, :, None].permute(0, 3, 1, 2)


def _filters(rows: Tensor) -> Tensor:
    """`[E, n, D]` as filters `[E D, n, 1, 1]`, rows of zeros added where they are too few."""
    return F.pad(rows.mT, (0, max(0, FEWEST_FILTERS - rows.shape[1]))).flatten(0, 1)[..., None, None]


def _features_first(rows: Tensor) -> Tensor:
    """The same `[E, n, F]`, lying in memory as `[F, E, n]`. PyTorch is quick only where a matrix is transposed."""
    return rows.flatten(0, 1).t().contiguous().unflatten(1, rows.shape[:2]).permute(1, 2, 0)
