"""`measure` on models whose cost is known."""

import pytest
import torch
from torch import Tensor, nn

from narrows.costs import Cost, Timing, measure
from narrows.costs.cost import scaled
from narrows.errors import InvalidArgument, InvalidType


class Two(nn.Module):
    """Two linear layers that share one weight, with what evaluation mode would change between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.modes.add((self.dropout.training, torch.is_grad_enabled()))
        return self.second(self.dropout(self.first(x))) * scale


def test_every_figure() -> None:
    cost = measure(Two(), torch.randn(4, 5, 8), repeats=3)
    assert cost.parameters == 64
    assert cost.macs == 2 * 5 * 64
    assert cost.peak_memory == 2 * 4 * 4 * 5 * 8
    assert (cost.batch, cost.device, cost.dtype) == (4, "cpu", "float32")
    assert len(cost.latency.samples) == 3
    assert cost.throughput.median == pytest.approx(4 / cost.latency.median)


@pytest.mark.parametrize("inputs", [(torch.ones(2, 8), 2.0), {"x": torch.ones(2, 8), "scale": 2.0}])
def test_positional_and_keyword_arguments(inputs: object) -> None:
    assert measure(Two(), inputs, repeats=1).macs == 2 * 64  # pyright: ignore[reportArgumentType]


def test_it_measures_evaluation_and_gives_the_model_back_as_it_was() -> None:
    model = Two()
    model.first.eval()
    measure(model, torch.randn(1, 8), repeats=1)
    assert model.modes == {(False, False)}
    assert model.training
    assert model.dropout.training
    assert not model.first.training


def test_the_model_comes_back_after_a_failure_too() -> None:
    model = Two()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(model, torch.randn(1, 7))
    assert model.dropout.training


def test_it_reads_well() -> None:
    cost = Cost(1_234_567, 98.7e6, 3 << 20, Timing((0.01, 0.02, 0.04)), 8, "cpu", "float32")
    assert str(cost) == (
        "parameters   1.23 M\n"
        "MACs         98.7 M per sample\n"
        "peak memory  3.0 MiB\n"
        "throughput   400.0 samples/s (280.0 to 640.0)\n"
        "latency      20.00 ms (14.00 to 32.00)\n"
        "measured     batch of 8, float32 on cpu"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_499, "999 k"), (999_600, "1 M"), (4.6e9, "4.6 G"), (1.5e12, "1.5 T")],
)
def test_scaled(count: int | float, text: str) -> None:
    assert scaled(count) == text


def test_no_tensor_among_the_inputs() -> None:
    with pytest.raises(InvalidType, match=r"inputs: expected a tensor, .* got \['int', 'str'\]\."):
        measure(Two(), (1, "image"))


def test_an_empty_batch() -> None:
    with pytest.raises(InvalidArgument, match=r"inputs: expected a batch of at least one sample, got \(0, 8\)\."):
        measure(Two(), torch.empty(0, 8))


def test_a_model_on_another_device() -> None:
    with pytest.raises(InvalidArgument, match=r"inputs: expected tensors on meta, where the model is, got one on cpu"):
        measure(Two().to("meta"), torch.ones(1, 8))
