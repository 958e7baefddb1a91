"""What the processor is like, and which of PyTorch's two libraries is the quicker on it."""

import platform
import re
from pathlib import Path

import torch
from torch import Tensor

# The first family of AMD's processors that has vectors of 512 bits, and the first that computes them at once.
FIRST_FAMILY = 25
FIRST_WIDE_FAMILY = 26


def chooses(tensor: Tensor) -> bool:
    """Whether there is a choice: in float32 on a CPU with wide vectors, without autocast."""
    return (
        HAS_WIDE_VECTORS
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def convolves(tensor: Tensor) -> bool:
    """Whether even a convolution is quicker than MKL. In compiled code it is not."""
    return MKL_IS_SLOW and chooses(tensor) and not torch.compiler.is_compiling()


def has_wide_vectors() -> bool:
    """Whether there is oneDNN, with vectors of 512 bits. With less, MKL is the quicker one everywhere."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def amd_family_with_mkl() -> int:
    """The family of an AMD processor with such vectors, where BLAS is MKL; -1 of any other."""
    if not has_wide_vectors() or not torch.backends.mkl.is_available():
        return -1
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    family = re.search(r"family\s*:?\s*(\d+)", text, re.IGNORECASE)
    return int(family[1]) if "AuthenticAMD" in text and family is not None else -1


# Constants, since compilers cannot look into the above.
HAS_WIDE_VECTORS = has_wide_vectors()
_FAMILY = amd_family_with_mkl()
# MKL takes 5 to 20 percent longer than oneDNN (Zen 4).
MKL_IS_BEHIND = FIRST_FAMILY <= _FAMILY < FIRST_WIDE_FAMILY
# MKL takes twice as long, since it keeps vectors of 512 bits from these (Zen 5).
MKL_IS_SLOW = _FAMILY >= FIRST_WIDE_FAMILY
