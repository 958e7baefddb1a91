import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.ops.soft_moe import experts as room
from narrows.ops.soft_moe import stacked_feed_forward
from tests.support import assert_close, assert_within_budget, gradients

Parameters = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
WAYS = ("hidden values kept", "rows kept")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to differentiate, in groups of experts even where all of them are small."""
    choose(request.param, monkeypatch)
    return request.param


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "_keeps_rows_only", lambda *_: way == "rows kept")


def parameters(num_experts: int, dim: int, hidden: int, *, gated: bool, seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    features = 2 * hidden if gated else hidden
    shapes = (num_experts, features, dim), (num_experts, features), (num_experts, dim, hidden), (num_experts, dim)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return (made[0], made[1]), (made[2], made[3])


def one_by_one(rows: Tensor, expand: tuple[Tensor, Tensor], contract: tuple[Tensor, Tensor], *, gated: bool) -> Tensor:
    outputs = []
    for own, weight_in, bias_in, weight_out, bias_out in zip(rows, *expand, *contract, strict=True):
        hidden = F.linear(own, weight_in, bias_in)
        half = hidden.shape[-1] // 2
        active = hidden[:, :half] * F.gelu(hidden[:, half:]) if gated else F.gelu(hidden)
        outputs.append(F.linear(active, weight_out, bias_out))
    return torch.stack(outputs)


@pytest.mark.parametrize("way", WAYS)
@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.data())
def test_a_feed_forward_network_is_its_experts_one_by_one(way: str, data: st.DataObject) -> None:
    num_experts, num_rows = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    dim, hidden, gated = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20)), data.draw(st.booleans())
    expand, contract = parameters(num_experts, dim, hidden, gated=gated)
    rows = torch.randn(num_rows, num_experts, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layout = data.draw(st.sampled_from(["as mixed", "expert by expert", "in wider memory"]))
    rows = rows.transpose(0, 1)
    if layout == "expert by expert":
        rows = rows.contiguous()
    if layout == "in wider memory":
        rows = F.pad(rows, (1, 2), value=torch.nan)[..., 1:-2]
    rows = rows.detach().requires_grad_()
    wanted = [data.draw(st.booleans()) for _ in range(5)]
    tensors = (rows, *expand, *contract)
    for tensor, learned in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(learned)
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(way, monkeypatch)
        ours = stacked_feed_forward(rows, expand, contract, gated=gated)
        theirs = one_by_one(rows, expand, contract, gated=gated)
        assert_close(ours, theirs, 1e-10)
        learned = [tensor for tensor in tensors if tensor.requires_grad]
        if learned:
            for a, b in zip(gradients(ours, *learned), gradients(theirs, *learned), strict=True):
                assert_close(a, b, 1e-9)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.usefixtures("way")
def test_a_feed_forward_network_is_differentiated_twice_and_by_torch_func(gated: bool) -> None:
    expand, contract = parameters(2, 2, 3, gated=gated)
    rows = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(rows: Tensor, *tensors: Tensor) -> Tensor:
        return stacked_feed_forward(rows, tensors[:2], tensors[2:], gated=gated)  # type: ignore[arg-type]

    tensors = (rows, *expand, *contract)
    assert torch.autograd.gradgradcheck(run, tensors)
    output = run(*tensors)
    directions = torch.randn(3, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, tensors, directions, is_grads_batched=True, retain_graph=True)
    for index, direction in enumerate(directions):  # the graph is there for a second and third time
        alone = torch.autograd.grad(output, tensors, direction, retain_graph=True)
        for a, b in zip(alone, together, strict=True):
            assert_close(a, b[index], 1e-10)
    (tangent,) = torch.func.jvp(lambda rows: run(rows, *tensors[1:]), (rows,), (torch.ones_like(rows),))[1:]
    assert_close(
        tangent,
        torch.autograd.functional.jvp(lambda rows: run(rows, *tensors[1:]), rows, torch.ones_like(rows))[1],
        1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.usefixtures("way")
def test_a_feed_forward_network_is_as_exact_as_its_formula_in_low_precision(gated: bool, dtype: torch.dtype) -> None:
    expand, contract = parameters(5, 16, 48, gated=gated)
    rows = torch.randn(5, 33, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        tensors = [(t / math.sqrt(16)).detach().to(dtype).requires_grad_() for t in (rows, *expand, *contract)]
        output = run(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:]), gated=gated)
        return [output, *gradients(output, *tensors)]

    exact = results(one_by_one, torch.float64)
    for fast, plain, oracle in zip(
        results(stacked_feed_forward, dtype), results(one_by_one, dtype), exact, strict=True
    ):
        assert fast.dtype == dtype
        assert_within_budget(fast, plain, oracle)


@pytest.mark.usefixtures("way")
def test_autocast_computes_in_its_dtype_and_gradients_have_that_of_the_parameters() -> None:
    expand, contract = ((w.float(), b.float()) for w, b in parameters(3, 4, 8, gated=False))
    tensors = [tensor.detach().requires_grad_() for tensor in (torch.randn(3, 5, 4), *expand, *contract)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = stacked_feed_forward(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:]), gated=False)
        with torch.no_grad():
            plain = stacked_feed_forward(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:]), gated=False)
    assert output.dtype == plain.dtype == torch.bfloat16
    assert_close(output.float(), plain.float(), 0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(output, *tensors))


def test_of_the_rows_nothing_else_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("rows kept", monkeypatch)
    expand, contract = parameters(3, 4, 16, gated=False)
    rows = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        stacked_feed_forward(rows, expand, contract, gated=False)
    own = {tensor.data_ptr() for tensor in (rows, *expand, *contract)}
    assert {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.usefixtures("way")
def test_outputs_and_gradients_of_rows_lie_as_the_mixture_reads_them(gated: bool) -> None:
    expand, contract = parameters(3, 4, 16, gated=gated)
    rows = torch.randn(5, 3, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    output = stacked_feed_forward(rows, expand, contract, gated=gated)
    (gradient,) = torch.autograd.grad(output, rows, torch.randn_like(output))
    with torch.no_grad():
        plain = stacked_feed_forward(rows, expand, contract, gated=gated)
    assert output.stride() == gradient.stride() == plain.stride() == (4, 12, 1)
