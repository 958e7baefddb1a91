"""Linear maps, by the quickest kernel there is for them.

In float32 on a CPU, PyTorch hands convolutions to oneDNN and products of matrices to BLAS, which for the packages of
PyPI is MKL. Which of the two is quicker depends on the processor (`processor`).
"""

from narrows.ops.linear.maps import linear, linear_gelu
from narrows.ops.linear.stacked import stacked_linear

__all__ = ["linear", "linear_gelu", "stacked_linear"]
