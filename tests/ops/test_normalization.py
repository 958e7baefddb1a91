"""LayerNorm without a bias, whichever kernel computes it."""

import pytest
import torch
from torch.nn import functional as F

from narrows.ops.normalization import normalized
from tests.support import assert_close, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_it_is_layer_norm(weighted: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 8).add(2).to(dtype).requires_grad_()
    weight = torch.randn(8).to(dtype) if weighted else None
    ours, theirs = normalized(x, weight), F.layer_norm(x, (8,), weight)
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2**-7
    assert ours.dtype == dtype
    assert_close(ours, theirs, tolerance)
    assert_close(*gradients(ours, x), *gradients(theirs, x), tolerance)
