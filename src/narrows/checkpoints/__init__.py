"""Other people's weights into these layers and models."""

from narrows.checkpoints.open_flamingo import OpenFlamingoParts, read_open_flamingo
from narrows.checkpoints.sepvit import read_sepvit
from narrows.checkpoints.slots import ObjectParts, read_objects
from narrows.checkpoints.upstream import from_upstream

__all__ = [
    "ObjectParts",
    "OpenFlamingoParts",
    "from_upstream",
    "read_objects",
    "read_open_flamingo",
    "read_sepvit",
]
