"""Bytes kept for backward and bytes alive at the peak, against cases known by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrows.costs import peak_memory, saved_for_backward

SIZE = 1000
BYTES = 4 * SIZE


def test_a_nonlinearity_keeps_one_tensor() -> None:
    x = torch.randn(SIZE, requires_grad=True)
    assert saved_for_backward(lambda: x.exp()) == BYTES


def test_an_addition_keeps_nothing() -> None:
    x = torch.randn(SIZE, requires_grad=True)
    assert saved_for_backward(lambda: x + 1) == 0


def test_without_gradients_nothing_is_kept() -> None:
    x = torch.randn(SIZE)
    assert saved_for_backward(lambda: x.exp()) == 0


def test_a_storage_kept_twice_counts_once() -> None:
    x = torch.randn(SIZE, requires_grad=True)

    def function() -> Tensor:
        y = x.exp()
        return y.view(10, 100).square() * y[:100]

    # exp keeps y, square keeps y through a view, the product keeps the square and a slice of y: two storages.
    assert saved_for_backward(function) == 2 * BYTES


def test_a_view_keeps_its_whole_storage() -> None:
    x = torch.randn(SIZE, requires_grad=True)
    base = torch.randn(10 * SIZE)
    assert saved_for_backward(lambda: x * base[:SIZE], exclude=[x]) == 10 * BYTES


def test_parameters_and_inputs_are_left_out_as_asked() -> None:
    linear, x = nn.Linear(50, 50), torch.randn(20, 50, requires_grad=True)
    assert saved_for_backward(lambda: linear(x)) == 4 * (20 * 50 + 50 * 50)
    assert saved_for_backward(lambda: linear(x), exclude=linear.parameters()) == 4 * 20 * 50
    assert saved_for_backward(lambda: linear(x), exclude=[x, *linear.parameters()]) == 0


def test_what_only_an_intermediate_graph_kept_does_not_count() -> None:
    x = torch.randn(SIZE, requires_grad=True)

    def function() -> Tensor:
        dropped = x.exp().sin().exp().detach()
        return x + dropped

    assert saved_for_backward(function) == 0


def test_checkpointing_keeps_less() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(50, 50), nn.GELU()) for _ in range(4)))
    x = torch.randn(20, 50, requires_grad=True)
    outside = [x, *layers.parameters()]
    assert saved_for_backward(lambda: layers(x), exclude=outside) == (4 + 3) * 4 * 20 * 50
    assert saved_for_backward(lambda: checkpoint(layers, x, use_reentrant=False), exclude=outside) == 0


def test_the_backward_pass_still_runs() -> None:
    x = torch.randn(SIZE, requires_grad=True)
    kept: list[Tensor] = []
    saved_for_backward(lambda: kept.append(x.exp()))
    kept[0].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.exp())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
class TestPeak:
    def test_a_result_alone(self, mode: type) -> None:
        x = torch.randn(SIZE)
        with mode():
            assert peak_memory(lambda: x + 1) == BYTES

    def test_a_chain_has_two_alive_at_a_time(self, mode: type) -> None:
        x = torch.randn(SIZE)

        def chain() -> Tensor:
            y = x + 1
            for _ in range(5):
                y = y + 1
            return y

        with mode():
            assert peak_memory(chain) == 2 * BYTES

    def test_tensors_held_add_up(self, mode: type) -> None:
        x = torch.randn(SIZE)
        with mode():
            assert peak_memory(lambda: [x + 1 for _ in range(5)]) == 5 * BYTES

    def test_views_and_in_place_operations_allocate_nothing(self, mode: type) -> None:
        x = torch.randn(SIZE)
        with mode():
            assert peak_memory(lambda: x.view(10, 100).transpose(0, 1).add_(1)) == 0

    def test_the_peak_may_lie_in_the_middle(self, mode: type) -> None:
        x = torch.randn(SIZE)
        with mode():
            assert peak_memory(lambda: torch.cat([x] * 8).sum()) == 8 * BYTES + 4

    def test_what_a_composite_operation_allocates_inside_is_seen(self, mode: type) -> None:
        logits, target = torch.randn(100, 10), torch.arange(100) % 10
        # The logarithms of the softmax, and the two numbers that nll_loss returns.
        with mode():
            assert peak_memory(lambda: torch.nn.functional.cross_entropy(logits, target)) == 4 * (100 * 10 + 2)


def test_storages_that_grow_count_as_they_grow() -> None:
    assert peak_memory(lambda: torch.empty(0).resize_(SIZE)) == BYTES
    x = torch.randn(SIZE)
    assert peak_memory(lambda: torch.add(x, 1, out=torch.empty(0))) == BYTES

    def grows_and_shrinks() -> Tensor:
        torch.empty(0).resize_(4 * SIZE)
        return x + 1

    assert peak_memory(grows_and_shrinks) == 4 * BYTES


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_results_conditions_and_flex_attention_are_tracked() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.randn(16, 16)
    indices, values = 16 * 2 * 8, 16 * 4
    assert peak_memory(lambda: torch.eye(16).to_sparse()) >= 16 * 16 * 4 + indices + values
    assert peak_memory(lambda: torch.eye(16).to_sparse_csr()) >= 16 * 16 * 4 + values
    assert peak_memory(lambda: torch.cond(x.sum() > 999, lambda x: x @ x, lambda x: x + x, (x,))) >= x.nbytes
    query = torch.randn(1, 2, 16, 8)
    assert peak_memory(lambda: flex_attention(query, query, query)) >= query.nbytes


@pytest.mark.compiled
def test_a_compiled_module_is_tracked_as_its_eager_self() -> None:
    torch._dynamo.reset()
    double = torch.compile(lambda x: x + x, backend="eager", fullgraph=True)
    x = torch.randn(SIZE)
    double(x)
    assert peak_memory(lambda: double(x)) == BYTES


def test_training_adds_what_backward_keeps() -> None:
    x = torch.randn(SIZE, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for _ in range(5):
            y = y.sin()
        return y

    with torch.no_grad():
        assert peak_memory(forward) == 2 * BYTES
    assert peak_memory(forward) == 5 * BYTES
    # Backward: five tensors kept less those already used, and the gradient on its way.
    assert 5 * BYTES < peak_memory(lambda: forward().sum().backward()) <= 8 * BYTES


def test_peak_is_the_same_every_time() -> None:
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 7, 16)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    step()
    assert len({peak_memory(step) for _ in range(3)}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_is_the_allocators() -> None:
    x = torch.randn(1 << 20, device="cuda")
    assert peak_memory(lambda: [x + 1 for _ in range(3)], "cuda") == 3 * (1 << 22)
