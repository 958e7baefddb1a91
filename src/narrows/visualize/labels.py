"""Where to write the names of points so that no name covers another name, a point or a line."""

from collections.abc import Iterator, Sequence
from math import cos, pi, sin
from typing import NamedTuple


class Box(NamedTuple):
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    area: Box,
    *,
    distances: Sequence[float],
) -> list[Box]:
    """A box for the label of each anchor, near it, inside `area`, that covers neither obstacle nor earlier label.

    For each anchor in turn the first free place of `distances` times sixteen directions is taken, the nearest first and
    to the right first; if there is none, the place that covers least.
    """
    placed: list[Box] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        taken = [*obstacles, *placed]
        best, least = None, float("inf")
        for box in _candidates(anchor, size, distances):
            outside = size[0] * size[1] - box.overlap(area)
            covered = sum(box.overlap(other) for other in taken) + outside
            if covered < least:
                best, least = box, covered
            if covered <= 1e-9 * size[0] * size[1]:
                break
        assert best is not None
        placed.append(best)
    return placed


def _candidates(anchor: tuple[float, float], size: tuple[float, float], distances: Sequence[float]) -> Iterator[Box]:
    (x, y), (width, height) = anchor, size
    for distance in distances:
        for step in (0, 2, -2, 4, -4, 8, 6, -6, 1, -1, 3, -3, 5, -5, 7, -7):
            direction = step * pi / 8
            centre_x = x + cos(direction) * (distance + width / 2)
            centre_y = y + sin(direction) * (distance + height / 2)
            yield Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
