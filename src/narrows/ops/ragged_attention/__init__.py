"""Attention of images that each have their own number of tokens, without padding."""

from narrows.ops.ragged_attention.api import IMPLEMENTATIONS, ragged_attention

__all__ = ["IMPLEMENTATIONS", "ragged_attention"]
