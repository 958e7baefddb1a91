"""What text may see: the media before it, by one of four rules."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from narrows.ops.media_attention.common import VisibleMedia
from narrows.validation import check_positive


@dataclass(frozen=True)
class Attend:
    """Base class: which of the media before it a text token sees. No rule ever shows it a later one.

    A subclass says in `_first` where the media that are seen begin. Later text must not go back to media that the text
    before it has left behind: decoding drops those.
    """

    @property
    def most(self) -> int | None:
        """The most media that a token can see; None: as many as there are."""
        return None

    def visible(
        self, media_locations: Bool[Tensor, "B T"], document_starts: Bool[Tensor, "B T"] | None = None
    ) -> VisibleMedia:
        """The media that each token of a text sees.

        Args:
            media_locations: `[B, T]`, True where a medium stands; the token there sees it already.
            document_starts: `[B, T]`, True at the first token of each document packed into the row: text sees the media
                of its own document only. None: a row is one document.
        """
        time = media_locations.cumsum(-1)
        first = self._first(time, media_locations)
        if document_starts is not None:
            of_others = torch.where(document_starts, time - media_locations.long(), 0).cummax(-1).values
            first = torch.maximum(first, of_others + 1)
        return VisibleMedia(first, time, self.most, ordered=True)

    def _first(self, time: Int[Tensor, "B T"], locations: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The first medium that is seen, documents aside; `time` is the number of the last. Below 1 is as good as 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class LastMedium(Attend):
    """The last medium before a token, and no other: the paper's rule."""

    @property
    def most(self) -> int:
        """One."""
        return 1

    def _first(self, time: Int[Tensor, "B T"], locations: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        return time


@dataclass(frozen=True)
class LastMedia(Attend):
    """The last `count` media before a token.

    Args:
        count: how many, at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        check_positive(count=self.count)

    @property
    def most(self) -> int:
        """The count."""
        return self.count

    def _first(self, time: Int[Tensor, "B T"], locations: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        return time - (self.count - 1)


@dataclass(frozen=True)
class AllPrevious(Attend):
    """Every medium before a token; in the paper 7 points worse than the last alone."""

    def _first(self, time: Int[Tensor, "B T"], locations: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        return torch.ones_like(time)


@dataclass(frozen=True)
class ConsecutiveGroup(Attend):
    """The last medium before a token and those that stand right before it, nothing between them.

    So does Llama 3.2 read several images ahead of one text. A token in the middle of a group sees the part before it.
    """

    def _first(self, time: Int[Tensor, "B T"], locations: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        opening = locations & ~pad(locations, (1, 0))[:, :-1]
        return torch.where(opening, time, 0).cummax(-1).values
