"""Other people's weights into these layers and models."""

from narrows.checkpoints.upstream import from_upstream

__all__ = ["from_upstream"]
