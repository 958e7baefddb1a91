"""Any causal language model of transformers made to read media, by gated cross attention from outside."""

from typing import TYPE_CHECKING, Any

from narrows.adapters.flamingo.audit import Audit, Finding, audit

if TYPE_CHECKING:
    from narrows.adapters.flamingo.model import PRESETS, Flamingo

__all__ = ["PRESETS", "Audit", "Finding", "Flamingo", "audit"]


def __getattr__(name: str) -> Any:
    """`Flamingo` and its presets are imported when they are asked for: they need transformers."""
    if name not in ("PRESETS", "Flamingo"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from narrows.adapters.flamingo import model

    return getattr(model, name)
