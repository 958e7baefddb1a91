"""Text attending to the media it may see."""

from narrows.ops.media_attention.api import ATTEND, IMPLEMENTATIONS, media_attention, media_attention_weights

__all__ = ["ATTEND", "IMPLEMENTATIONS", "media_attention", "media_attention_weights"]
