"""All costs of a forward pass, measured at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrows.costs.macs import macs_per_sample
from narrows.costs.memory import peak_memory
from narrows.costs.speed import Spread, Timing, compare_speed
from narrows.errors import InvalidArgument, InvalidType
from narrows.validation import check_positive, checked


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass of a model, in evaluation mode and without gradients.

    Args:
        parameters: number of parameters; shared ones count once.
        macs: multiply-accumulates per sample, with the tokens really kept (`macs_per_sample`).
        peak_memory: greatest number of bytes alive at one time beyond weights and inputs, for the whole batch.
        latency: seconds for the whole batch.
        batch: how many samples went through at once.
        device: where it ran.
        dtype: of the inputs.
    """

    parameters: int
    macs: float
    peak_memory: int
    latency: Timing
    batch: int
    device: str
    dtype: str

    @property
    def throughput(self) -> Spread:
        """Samples per second."""
        return Spread(tuple(self.batch / seconds for seconds in self.latency.samples))

    def __str__(self) -> str:
        speed, latency = self.throughput, self.latency
        return "\n".join(
            (
                f"parameters   {scaled(self.parameters)}",
                f"MACs         {scaled(self.macs)} per sample",
                f"peak memory  {self.peak_memory / 2**20:.1f} MiB",
                f"throughput   {speed.median:.1f} samples/s ({speed.p20:.1f} to {speed.p80:.1f})",
                f"latency      {latency.median * 1e3:.2f} ms ({latency.p20 * 1e3:.2f} to {latency.p80 * 1e3:.2f})",
                f"measured     batch of {self.batch}, {self.dtype} on {self.device}",
            )
        )


@checked
def measure(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    repeats: int = 9,
    warmup: int = 2,
) -> Cost:
    """Measure the cost of a forward pass; the model is left as it was.

    >>> cost = measure(nn.Linear(64, 10), torch.randn(8, 64))
    >>> cost.parameters, cost.macs, cost.peak_memory
    (650, 640.0, 320)

    Args:
        model: any module, on the device of its inputs.
        inputs: its arguments: one tensor, a tuple of positional or a mapping of keyword arguments. The first axis of
            the first tensor is the batch.
        repeats: number of speed samples.
        warmup: calls before the first sample.

    Raises:
        InvalidType: `inputs` holds no tensor.
        InvalidArgument: the batch is empty, or the model is on another device.
    """
    check_positive(repeats=repeats)
    if warmup < 0:
        raise InvalidArgument("warmup", expected="0 or more", got=warmup)
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    positional = () if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    first = _first_tensor((*positional, *keywords.values()))
    weight = next(model.parameters(), first)
    if weight.device != first.device:
        raise InvalidArgument(
            "inputs", expected=f"tensors on {weight.device}, where the model is", got=f"one on {first.device}"
        )

    def forward() -> object:
        return model(*positional, **keywords)

    with evaluating(model):
        macs = macs_per_sample(model, *positional, batch=len(first), **keywords)
        memory = peak_memory(forward, first.device)
        latency = compare_speed({"": forward}, repeats=repeats, warmup=warmup, device=first.device)[""]
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        peak_memory=memory,
        latency=latency,
        batch=len(first),
        device=torch.cuda.get_device_name(first.device) if first.is_cuda else str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
    )


def scaled(count: int | float) -> str:
    """A count with three significant digits and a unit prefix.

    >>> scaled(1234567)
    '1.23 M'
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def _first_tensor(inputs: tuple[Any, ...]) -> Tensor:
    for value in inputs:
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) == 0:
                raise InvalidArgument("inputs", expected="a batch of at least one sample", got=tuple(value.shape))
            return value
    raise InvalidType(
        "inputs",
        expected="a tensor, or a tuple or mapping with one",
        got=[type(value).__name__ for value in inputs],
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients in the context; every module gets its mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
