"""Images: digit scenes that need no download, and folders of your own. `load` is the entry to both."""

from typing import TYPE_CHECKING, Any

from narrows.data.images import IGNORED, Augmentation, ImageData, ImageSet, RememberedImages, picture
from narrows.data.load import load
from narrows.data.object_scenes import DigitObjects, ObjectScene, SpriteScenes
from narrows.data.positions import Position, PositionSampler
from narrows.data.scenes import DigitScenes, Scenes, SegmentedDigits, SegmentedScenes

if TYPE_CHECKING:
    from narrows.data.module import ImageDataModule

__all__ = [
    "IGNORED",
    "Augmentation",
    "DigitObjects",
    "DigitScenes",
    "ImageData",
    "ImageDataModule",
    "ImageSet",
    "ObjectScene",
    "Position",
    "PositionSampler",
    "RememberedImages",
    "Scenes",
    "SegmentedDigits",
    "SegmentedScenes",
    "SpriteScenes",
    "load",
    "picture",
]


def __getattr__(name: str) -> Any:
    if name == "ImageDataModule":  # needs Lightning, which the rest does not
        try:
            from narrows.data.module import ImageDataModule
        except ImportError as error:
            from narrows.errors import MissingExtra

            raise MissingExtra(error.name or "lightning", extra="train", purpose="train") from error
        return ImageDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
