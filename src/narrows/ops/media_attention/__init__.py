"""Text attending to the media it may see."""

from narrows.ops.media_attention.api import IMPLEMENTATIONS, media_attention, media_attention_weights
from narrows.ops.media_attention.common import VisibleMedia
from narrows.ops.media_attention.policies import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium

__all__ = [
    "IMPLEMENTATIONS",
    "AllPrevious",
    "Attend",
    "ConsecutiveGroup",
    "LastMedia",
    "LastMedium",
    "VisibleMedia",
    "media_attention",
    "media_attention_weights",
]
