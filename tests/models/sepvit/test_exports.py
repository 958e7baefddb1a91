"""One graph under compile; export and ONNX with any batch, at sizes with and without padding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.sepvit.small import images, small
from tests.support import assert_close, parameter_gradients

pytestmark = pytest.mark.compiled
two_sizes = pytest.mark.parametrize("size", [(32, 32), (20, 27)], ids=str)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked: bool) -> None:
    """Windows as views without a mask; padded windows, and images of two sizes, with one."""
    torch._dynamo.reset()
    size = (20, 27) if masked else (32, 32)
    model, x, mask = small(depths=(1, 2)), images(*size), None
    if masked:
        mask = torch.zeros(2, *size, dtype=torch.bool)
        mask[0, :11], mask[1, :, :18] = True, True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, expected = compiled(x, mask), model(x, mask)
    assert_close(logits, expected, 1e-5)
    expected_gradients = parameter_gradients(model, expected)
    for name, gradient in parameter_gradients(model, logits).items():
        assert_close(gradient, expected_gradients[name], 1e-4)


@two_sizes
def test_exports_with_any_batch(size: tuple[int, int]) -> None:
    model = small()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(*size),), dynamic_shapes=({0: batch},), strict=False).module()
        for count in (1, 5):
            others = images(*size, batch=count)
            assert_close(program(others), model(others), 1e-5)


@two_sizes
def test_onnx_runtime_computes_the_same(size: tuple[int, int], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = small(depths=(1, 2)), tmp_path / "sepvit.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images(*size),), file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    others = images(*size, batch=3)
    (logits,) = session.run(None, {session.get_inputs()[0].name: others.numpy()})
    assert np.abs(logits - model(others).detach().numpy()).max() < 1e-4
