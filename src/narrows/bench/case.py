"""What a benchmark case is: narrows and a rival that compute the same, and how much faster narrows has to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Contest(NamedTuple):
    """Two modules with the same weights and the call both take.

    Args:
        narrows: ours.
        rival: theirs.
        call: runs either on the inputs and returns the tensor that is compared and differentiated.
        tolerance: greatest absolute difference of the two outputs, and of the input gradients relative to their largest
            entry, at which they still count as the same; None where outputs are not comparable (and `why_not_equal`
            of the case must say why).
        inputs: tensors whose gradients are taken in the backward pass; parameters' gradients are taken as well.
        others: floating-point tensors that the call reads besides; they follow the inputs into another dtype.
        continuous: whether rounding moves the output a little. A choice of tokens may fall otherwise in low precision,
            which then is not compared with float32.

    Modules and tensors are made in float32.
    """

    narrows: nn.Module
    rival: nn.Module
    call: Callable[[nn.Module], Tensor]
    inputs: tuple[Tensor, ...]
    tolerance: float | None = 1e-4
    others: tuple[Tensor, ...] = ()
    continuous: bool = True


# What a layer promises against the package it replaces, on every machine.
NEVER_SLOWER: Mapping[str, float] = {"forward": 1.0, "forward+backward": 1.0}


@dataclass(frozen=True)
class BenchCase:
    """One row of the benchmark.

    Args:
        name: `mechanism/shape`, unique.
        rival: the package and class raced against, for the table.
        prepare: builds the contest on a device; called once, right before timing.
        targets: least ratio rival / narrows for each of "forward", "forward+backward" (time) and "saved" (bytes kept
            for backward). Measured and reported in any case; a target only adds a verdict.
        why_not_equal: for a contest without tolerance, why outputs differ by design.
        quantities: what is measured; a network too large to train is raced forward only.
        device: "cpu" or "cuda" where it is made for one of them; run on both if None.
    """

    name: str
    rival: str
    prepare: Callable[[torch.device], Contest]
    targets: Mapping[str, float] = field(default_factory=dict)
    why_not_equal: str = ""
    quantities: tuple[str, ...] = ("forward", "forward+backward", "saved")
    device: str | None = None
