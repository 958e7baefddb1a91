"""What tests compare with. Tolerances are derived, never tuned."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Function = Callable[..., Tensor]
Results = Sequence[Tensor]


def needs(package: str, oldest: str) -> None:
    """Skip a test of what `package` can do since `oldest` where an older one is installed."""
    if Version(found := version(package)) < Version(oldest):
        pytest.skip(f"needs {package} {oldest}, found {found}")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, absolute for values up to 1 and relative to the largest beyond."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item() if actual.numel() else 0.0
    assert difference <= tolerance * scale, f"differs by {difference:.2e}, allowed {tolerance * scale:.2e}"


def assert_within_budget(fast: Tensor, plain: Tensor, oracle: Tensor, factor: float = 2.0) -> None:
    """`fast` is at most twice as wrong as `plain` against the float64 `oracle`, plus one rounding of the oracle.

    `fast` and `plain` were computed in the same low precision, `plain` by the textbook formula.
    """
    assert_within_budget_on_average([([fast], [plain], [oracle])], factor)


def assert_within_budget_on_average(draws: Sequence[tuple[Results, Results, Results]], factor: float = 2.0) -> None:
    """The rule of `assert_within_budget` for greatest errors averaged over draws of (fast, plain, oracle).

    In one draw either may be lucky, and which BLAS rounds how decides who.
    """
    results = zip(*(zip(*kind, strict=True) for kind in zip(*draws, strict=True)), strict=True)
    for index, (fast, plain, oracle) in enumerate(results):
        assert all(exact.dtype == torch.float64 for exact in oracle)
        error = sum(map(_greatest_error, fast, oracle))
        rounding = sum(torch.finfo(f.dtype).eps * o.abs().max().item() for f, o in zip(fast, oracle, strict=True))
        allowed = factor * sum(map(_greatest_error, plain, oracle)) + 2 * rounding
        assert error <= allowed, f"result {index}: error {error:.3e}, allowed {allowed:.3e}"


class RoundedTo(TorchDispatchMode):
    """Rounds what every operation gives to `dtype`: a formula as it is computed there, one rounding at each step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        if func._schema.is_mutable and isinstance(result, Tensor):
            return result.copy_(self._round(result))
        return tree_map_only(Tensor, self._round, result)

    def _round(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).to(value.dtype) if value.is_floating_point() else value


def _greatest_error(result: Tensor, oracle: Tensor) -> float:
    assert torch.isfinite(result).all(), "not finite"
    return (result.double() - oracle).abs().max().item()


def gradients(output: Tensor, *inputs: Tensor, seed: int = 7) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of `output`: sees every element, unlike a sum."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    grads = torch.autograd.grad(output, inputs, direction, allow_unused=True)
    return tuple(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))


def assert_same_function(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-5
) -> None:
    """Two functions of one tensor agree in output and in the gradient of the input."""
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    out_a = ours(a)
    torch.manual_seed(0)
    out_b = theirs(b)
    assert_close(out_a, out_b, tolerance)
    assert_close(*gradients(out_a, a), *gradients(out_b, b), tolerance)


def parameter_gradients(module: nn.Module, output: Tensor) -> Mapping[str, Tensor]:
    """The gradient of every parameter of `module` for a fixed random projection of `output`."""
    named = dict(module.named_parameters())
    return dict(zip(named, gradients(output, *named.values()), strict=True))
