"""Token bottlenecks for PyTorch."""

from narrows._version import __version__

__all__ = ["__version__"]
