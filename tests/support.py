"""What tests compare with. Tolerances are derived, never tuned."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]


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
    assert oracle.dtype == torch.float64
    assert torch.isfinite(fast).all(), "not finite"
    rounding = torch.finfo(fast.dtype).eps * oracle.abs().max().item()
    error = (fast.double() - oracle).abs().max().item()
    allowed = factor * (plain.double() - oracle).abs().max().item() + 2 * rounding
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


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
