"""Whether the two of a contest compute the same: in float32 to a tolerance, below it as well as precision allows."""

from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from narrows.bench.case import Contest

SEED = 0


class Result(NamedTuple):
    """What a module gives: its output, and the gradients of the inputs along a fixed direction."""

    output: Tensor
    gradients: tuple[Tensor | None, ...]


def result_of(contest: Contest, module: nn.Module) -> Result:
    """The result of one of the two, with the noise that the other one gets, in any precision."""
    with _SameNoise():
        output = contest.call(module)
    if not contest.inputs:
        return Result(output.detach(), ())
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED)).to(output)
    return Result(output.detach(), torch.autograd.grad(output, contest.inputs, direction, allow_unused=True))


def disagreement(contest: Contest) -> str:
    """How outputs or input gradients of the two differ beyond the tolerance; empty where they do not."""
    if contest.tolerance is None:
        return ""
    ours, theirs = result_of(contest, contest.narrows), result_of(contest, contest.rival)
    if ours.output.shape != theirs.output.shape:
        return f"output has shape {tuple(ours.output.shape)}, the rival's {tuple(theirs.output.shape)}"
    off = _difference(ours.output, theirs.output)
    if not off <= contest.tolerance:
        return f"outputs differ by {off:.2e}, allowed {contest.tolerance:.0e}"
    for index, (our, their) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        if our is None or their is None:
            if our is not their:
                return f"only one of the two has a gradient for input {index}"
            continue
        off = _difference_of_most(our, their) / max(their.abs().max().item(), torch.finfo(their.dtype).tiny)
        if not off <= contest.tolerance:
            return f"gradients of input {index} differ by {off:.2e} of the largest, allowed {contest.tolerance:.0e}"
    return ""


def precision_lost(contest: Contest, exact: Result | None) -> str:
    """Where narrows loses more than the rival in a low precision; empty where it does not.

    Args:
        contest: in that precision.
        exact: the result in float32. Errors, as root mean squares over a tensor, may be twice the rival's, and one
            rounding more. None where there is no telling: outputs then have to be finite.
    """
    if exact is None:
        with torch.no_grad():  # a network too large to train is raced too
            return "" if torch.isfinite(contest.call(contest.narrows)).all() else "output is not finite"
    ours, theirs = result_of(contest, contest.narrows), result_of(contest, contest.rival)
    for name, our, their, right in zip(
        ("output", *(f"gradient of input {index}" for index in range(len(contest.inputs)))),
        (ours.output, *ours.gradients),
        (theirs.output, *theirs.gradients),
        (exact.output, *exact.gradients),
        strict=True,
    ):
        if our is None or their is None or right is None:
            continue
        rounding = torch.finfo(our.dtype).eps * _root_mean_square(right)
        error, allowed = _root_mean_square(our - right), 2 * _root_mean_square(their - right) + rounding
        if not error <= allowed:
            return f"{name} in {our.dtype} is off float32 by {error:.2e}, allowed {allowed:.2e}, twice the rival's"
    return ""


def _root_mean_square(values: Tensor) -> float:
    return values.float().square().mean().sqrt().item() if values.numel() else 0.0


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Greatest absolute difference; NaN, which is within no tolerance, where either has one."""
    return (ours - theirs).abs().max().item()


def _difference_of_most(ours: Tensor, theirs: Tensor) -> float:
    """Greatest absolute difference but for one number in a thousand; NaN where any has one.

    Where the input of a ReLU is 0 but for rounding, its slope is 0 in the one and 1 in the other.
    """
    differences = (ours - theirs).abs().flatten()
    if differences.isnan().any():
        return nan
    return differences.kthvalue(len(differences) - len(differences) // 1000).values.item()


class _SameNoise(TorchFunctionMode):
    """Random numbers drawn in float32 from one seed: the same for both, on any device and, rounded, in any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(SEED)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.randn:
            return result.copy_(torch.empty(result.shape).normal_(generator=self.generator))
        if func is Tensor.uniform_:
            return result.copy_(torch.empty(result.shape).uniform_(generator=self.generator))
        return result
