"""Text with images in it: `Document`, and what training asks of many of them, `InterleavedSet`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from narrows.data.positions import Position

IMAGE = "<image>"
"""Stands in a text where an image stands."""

END_OF_CHUNK = "<|endofchunk|>"
"""Ends what is said about an image."""


@dataclass(frozen=True)
class Document:
    """A text and its images.

    Args:
        text: with `IMAGE` where an image stands.
        images: one for each `IMAGE`, with values in 0..1.
        counts: False for a document that only fills up a batch and is not learned from.
    """

    text: str
    images: Float[Tensor, "M C H W"]
    counts: bool = True


class InterleavedSet(Dataset[Document]):
    """Documents that can be fetched a batch at a time.

    A subclass implements `__len__`, `documents` and `name`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These documents, a pure function of the arguments."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call this document in a table or an error."""
        raise NotImplementedError

    def __getitem__(self, index: int | Position) -> Document:
        position = index if isinstance(index, Position) else Position(range(len(self))[index])
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[Position]) -> list[Document]:
        """A whole batch at once: `DataLoader` calls this where it is there."""
        documents = self.documents([position.index for position in positions], positions[0].epoch)
        return [replace(one, counts=place.counts) for one, place in zip(documents, positions, strict=True)]


def with_chunk_ends(text: str) -> str:
    """The text with `END_OF_CHUNK` after what is said about each image, where it is not there yet.

    >>> with_chunk_ends("Two cats: <image><image> a tabby. <image>a Persian")
    'Two cats:<|endofchunk|><image><image>a tabby.<|endofchunk|><image>a Persian<|endofchunk|>'
    """
    pieces = [piece.strip() for piece in re.split(f"({re.escape(IMAGE)})", text)]
    return "".join(
        piece if piece in ("", IMAGE) or piece.endswith(END_OF_CHUNK) else piece + END_OF_CHUNK for piece in pieces
    )
