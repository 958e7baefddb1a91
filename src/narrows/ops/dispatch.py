"""How `impl=` is resolved, the same way for every operation."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from narrows.errors import ImplementationUnavailable, InvalidArgument

# Looked for once: what compilers trace may not look for it.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def why_no_kernels() -> str | None:
    """The reason why this machine runs no kernels of Triton's, or None where it does."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def why_no_cuda() -> str | None:
    """The reason why this machine runs nothing of CUDA's, or None where it does."""
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def _runs_everywhere() -> str | None:
    return None


class Implementation(NamedTuple):
    """One way to compute an operation.

    Args:
        run: the function; all implementations of an operation share its signature.
        summary: one line for `narrows info`: what it does differently.
        why_not: the reason why it cannot run on this machine, or None where it can.
    """

    run: Callable[..., Any]
    summary: str
    why_not: Callable[[], str | None] = _runs_everywhere


def resolve(
    operation: str, impl: str, implementations: Mapping[str, Implementation], *, auto: str
) -> Callable[..., Any]:
    """The function behind `impl`. Only "auto" may choose; a name runs as named or raises.

    What "auto" takes, `auto`, was chosen by the tensors and not by the machine: it is not asked whether it can run.
    """
    name = auto if impl == "auto" else impl
    if name not in implementations:
        raise InvalidArgument("impl", expected=f"'auto' or one of {sorted(implementations)}", got=repr(impl))
    reason = None if impl == "auto" else implementations[name].why_not()
    if reason is not None:
        raise ImplementationUnavailable(
            f"{operation}: impl={name!r} cannot run here: {reason}. Use impl='auto', or see `narrows info`."
        )
    return implementations[name].run
