"""Pictures of text that attends to media."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
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
BESIDE = 56
"""Characters of a line in which media stand, with `MARGIN` before the text: as wide as a column of text."""
MARGIN = 12
LINES = 3
"""That a medium in the text is high."""


def reading(
    words: Sequence[str],
    media: Iterable[object],
    columns: Mapping[str, Routing],
    *,
    locations: Sequence[int] | None = None,
    sample: int = 0,
    title: str | None = None,
) -> "matplotlib.figure.Figure":
    """Text in which each word has the colour of the medium it reads most, with the media in frames of their colours.

    The media stand above the text, or, where `locations` are known, in it.

    Args:
        words: the tokens of the text.
        media: images, as `overlay` takes them.
        columns: by heading, a routing of text to media, weights `[B, H, M, T]`: attention of a gated block
            (`Flamingo.routing`), or changes that an audit saw (`Audit.routing`). The text stands once below each; the
            more a word takes from its medium, the stronger the colour, against the greatest value of this heading.
        locations: for each medium the word that stands for it: the medium is drawn in its place, and begins a line.
        sample: which row of the routings' batch the text is.
        title: above the picture.

    Raises:
        InvalidArgument: a routing with another number of words or with fewer media, no medium or routing at all, or
            not one location for each medium in order.
        MissingExtra: without matplotlib.
    """
    images = [fit(to_image(image, name=f"media[{index}]")) for index, image in enumerate(media)]
    if not images:
        raise InvalidArgument("media", expected="at least one image", got="none")
    if not columns:
        raise InvalidArgument("columns", expected="at least one routing", got="none")
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
    if locations is not None:
        known = sorted(set(locations)) == list(locations) and all(0 <= place < len(words) for place in locations)
        if not known or len(locations) != len(images):
            expected = f"{len(images)} ascending places in the text, one for each medium"
            raise InvalidArgument("locations", expected=expected, got=list(locations))
        figure = _beside(words, images, maps, locations)
    else:
        figure = _below(words, images, maps)
    if title:
        set_title(figure, title)
    set_note(figure, "A word has the colour of the image it takes most from, the stronger the more it takes.")
    return figure


def _below(
    words: Sequence[str], images: Sequence[Float[Tensor, "3 H W"]], maps: Mapping[str, Float[Tensor, "M T"]]
) -> "matplotlib.figure.Figure":
    """The text below all media."""
    places = _places(words, CHARACTERS)
    text_height = LINE_HEIGHT * (places[-1][1] + 1) if places else LINE_HEIGHT
    in_row = min(len(images), int(WIDTH / THUMBNAIL))
    rows = -(-len(images) // in_row)
    heights = [(THUMBNAIL + 0.25) * rows, *(text_height + 0.25 for _ in maps)]
    figure = new_figure(WIDTH, sum(heights) + 0.8)
    grid = figure.add_gridspec(1 + len(maps), 1, height_ratios=heights)
    thumbnails = grid[0].subgridspec(rows, max(in_row, 5))
    for number, image in enumerate(images):
        axis = figure.add_subplot(thumbnails[number // in_row, number % in_row])
        show_picture(axis, image, f"image {number + 1}", carrier_colour(number))
    for row, (heading, weights) in enumerate(maps.items(), start=1):
        axis = figure.add_subplot(grid[row])
        _write(axis, words, places, weights, range(len(words)))
        _finish(axis, heading, CHARACTERS, places[-1][1] + 1 if places else 1)
    return figure


def _beside(
    words: Sequence[str],
    images: Sequence[Float[Tensor, "3 H W"]],
    maps: Mapping[str, Float[Tensor, "M T"]],
    locations: Sequence[int],
) -> "matplotlib.figure.Figure":
    """Each medium where it stands in the text, with the text up to the next one beside it."""
    from matplotlib.patches import Rectangle

    starts = [*locations, len(words)]
    parts = [range(starts[0]), *(range(start + 1, end) for start, end in pairwise(starts))]
    places: list[tuple[int, int | float]] = [(0, 0.0)] * len(words)
    tops: list[float] = []
    top = 0.2
    for medium, part in enumerate(parts, start=-1):
        inside = _places([words[index] for index in part], BESIDE - MARGIN if medium >= 0 else BESIDE)
        lines = inside[-1][1] + 1 if inside else 0
        height = max(LINES, lines) if medium >= 0 else lines
        for index, (column, line) in zip(part, inside, strict=True):
            places[index] = (column + MARGIN * (medium >= 0), top + (height - lines) / 2 + line)
        tops.append(top)
        top += height + 0.5 * bool(height)
    figure = new_figure(WIDTH * (BESIDE + 4) / CHARACTERS, (LINE_HEIGHT * top + 0.35) * len(maps) + 0.4)
    for axis, (heading, weights) in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps.items(), strict=True):
        for number, (image, upper) in enumerate(zip(images, tops[1:], strict=True)):
            height, width = image.shape[-2:]
            wide = LINES * LINE_HEIGHT / (WIDTH / CHARACTERS) * width / height
            shrink = min(1.0, (MARGIN - 1.5) / wide)
            left, high = -0.3, LINES * shrink
            right, above = left + wide * shrink, upper + (LINES - high) / 2
            axis.imshow(image.movedim(0, -1).numpy(), extent=(left, right, above + high, above), aspect="auto")
            colour = carrier_colour(number)
            axis.add_patch(Rectangle((left, above), right - left, high, fill=False, color=colour, linewidth=3))
        _write(axis, words, places, weights, [index for part in parts for index in part])
        _finish(axis, heading, BESIDE, top)
    return figure


def _places(words: Sequence[str], characters: int) -> list[tuple[int, int]]:
    """For each word, in which column and in which line of so many characters it begins."""
    places, column, line = [], 0, 0
    for word in words:
        if column and column + len(word) > characters:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(word) + 1
    return places


def _write(
    axis: Any,
    words: Sequence[str],
    places: Sequence[tuple[int, int | float]],
    weights: Float[Tensor, "M T"],
    written: Iterable[int],
) -> None:
    """Those of the words that are `written`, at their places, in the colours of what they read."""
    from matplotlib.patches import Rectangle

    share, medium = weights.max(0)
    strength = (share / share.max().clamp(min=torch.finfo(share.dtype).tiny)).tolist()
    for index in written:
        word, (column, line), colour = words[index], places[index], carrier_colour(int(medium[index]))
        box = Rectangle((column - 0.4, line + 0.08), len(word) + 0.8, 0.84, color=colour, alpha=strength[index])
        box.set_linewidth(0)
        axis.add_patch(box)
        axis.text(column, line + 0.5, word, family="monospace", fontsize=10, color=INK, va="center_baseline")


def _finish(axis: Any, heading: str, characters: int, lines: int | float) -> None:
    axis.set_title(heading, fontsize=10, fontweight="bold", color=INK, loc="left")
    axis.set_xlim(-0.5, characters + 0.5)
    axis.set_ylim(lines, 0)
    axis.set_axis_off()
