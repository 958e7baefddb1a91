"""Text attending to the media it may see."""

from narrows.ops.media_attention.api import IMPLEMENTATIONS, media_attention, media_attention_weights
from narrows.ops.media_attention.policies import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from narrows.ops.media_attention.visible import VisibleMedia

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
