"""Pictures of text that attends to media."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from narrows.visualize.canvas import INK, carrier_colour, new_figure, set_note, set_title, show_picture
from narrows.visualize.images import fit, to_image

if TYPE_CHECKING:
    import matplotlib.figure

WIDTH = 7.8
THUMBNAIL = 1.1
LINE_HEIGHT = 0.29
CHARACTERS = 88
"""Of a line; a font of equal widths, ten points high, fills `WIDTH` inches with them."""


def reading(
    words: Sequence[str],
    media: Iterable[object],
    columns: Mapping[str, Routing],
    *,
    sample: int = 0,
    title: str | None = None,
) -> "matplotlib.figure.Figure":
    """Text in which each word has the colour of the medium it reads most, below the media in frames of their colours.

    Args:
        words: the tokens of the text.
        media: images, as `overlay` takes them.
        columns: by heading, a routing of text to media, weights `[B, H, M, T]`: attention of a gated block
            (`Flamingo.routing`), or changes that an audit saw (`Audit.routing`). The text stands once below each; the
            more a word takes from its medium, the stronger the colour, against the greatest value of this heading.
        sample: which row of the routings' batch the text is.
        title: above the picture.

    Raises:
        InvalidArgument: a routing with another number of words or with fewer media, or no medium at all.
        MissingExtra: without matplotlib.
    """
    images = [fit(to_image(image, name=f"media[{index}]")) for index, image in enumerate(media)]
    if not images:
        raise InvalidArgument("media", expected="at least one image", got="none")
    maps = {}
    for heading, routing in columns.items():
        shape = tuple(routing.weights.shape)
        if shape[-1] != len(words) or shape[2] < len(images) or not 0 <= sample < shape[0]:
            raise InvalidArgument(
                f"columns[{heading!r}]",
                expected=f"weights [B, H, M, T] with M = {len(images)}, T = {len(words)} and a sample {sample}",
                got=shape,
            )
        maps[heading] = routing.detach().weights[sample].mean(0)[: len(images)]
    places = _places(words)
    text_height = LINE_HEIGHT * (places[-1][1] + 1) if places else LINE_HEIGHT
    in_row = min(len(images), int(WIDTH / THUMBNAIL))
    rows = -(-len(images) // in_row)
    heights = [(THUMBNAIL + 0.25) * rows, *(text_height + 0.25 for _ in maps)]
    figure = new_figure(WIDTH, sum(heights) + 0.5 + (0.3 if title else 0))
    grid = figure.add_gridspec(1 + len(maps), 1, height_ratios=heights)
    thumbnails = grid[0].subgridspec(rows, max(in_row, 5))
    for number, image in enumerate(images):
        axis = figure.add_subplot(thumbnails[number // in_row, number % in_row])
        show_picture(axis, image, f"image {number + 1}", carrier_colour(number))
    for row, (heading, weights) in enumerate(maps.items(), start=1):
        axis = figure.add_subplot(grid[row])
        axis.set_title(heading, fontsize=10, fontweight="bold", color=INK, loc="left")
        _write(axis, words, places, weights)
    if title:
        set_title(figure, title)
    set_note(figure, "A word has the colour of the image it takes most from, the stronger the more it takes.")
    return figure


def _places(words: Sequence[str]) -> list[tuple[int, int]]:
    """For each word, in which column and in which line it begins."""
    places, column, line = [], 0, 0
    for word in words:
        if column and column + len(word) > CHARACTERS:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(word) + 1
    return places


def _write(axis: Any, words: Sequence[str], places: Sequence[tuple[int, int]], weights: Float[Tensor, "M T"]) -> None:
    from matplotlib.patches import Rectangle

    share, medium = weights.max(0)
    strength = share / share.max().clamp(min=torch.finfo(share.dtype).tiny)
    for word, (column, line), number, alpha in zip(words, places, medium.tolist(), strength.tolist(), strict=True):
        box = Rectangle((column - 0.4, line + 0.08), len(word) + 0.8, 0.84, color=carrier_colour(number), alpha=alpha)
        box.set_linewidth(0)
        axis.add_patch(box)
        axis.text(column, line + 0.5, word, family="monospace", fontsize=10, color=INK, va="center_baseline")
    axis.set_xlim(-0.5, CHARACTERS + 0.5)
    axis.set_ylim(places[-1][1] + 1 if places else 1, 0)
    axis.set_axis_off()
