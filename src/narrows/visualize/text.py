"""Pictures of text that attends to media."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from narrows.visualize.canvas import INK, LINE, new_figure, set_note, set_title
from narrows.visualize.images import to_image

if TYPE_CHECKING:
    import matplotlib.figure

CELL = 0.34


def reading(
    words: Sequence[str],
    media: Iterable[object],
    columns: Mapping[str, Routing],
    *,
    sample: int = 0,
    title: str | None = None,
) -> "matplotlib.figure.Figure":
    """Heat maps of how much each word (column) reads of each medium (row).

    Args:
        words: the tokens of the text.
        media: images, as `overlay` takes them.
        columns: by heading, a routing of text to media, weights `[B, H, M, T]`: attention of a gated block
            (`Flamingo.routing`), or changes that an audit saw (`Audit.routing`). Each is scaled to its own maximum.
        sample: which row of the routings' batch the text is.
        title: above the picture.

    Raises:
        InvalidArgument: a routing with another number of words or with fewer media, or no medium at all.
        MissingExtra: without matplotlib.
    """
    images = [to_image(image, name=f"media[{index}]") for index, image in enumerate(media)]
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
    figure = new_figure(1.5 + len(maps) * (CELL * len(words) + 0.4), 1.5 + CELL * 2.2 * len(images))
    widths = [CELL * 2.2, *(CELL * len(words) for _ in maps)]
    grid = figure.add_gridspec(len(images), 1 + len(maps), width_ratios=widths)
    for row, image in enumerate(images):
        axis = figure.add_subplot(grid[row, 0])
        axis.imshow(image.movedim(0, -1).numpy(), interpolation="nearest")
        _bare(axis)
    for column, (heading, weights) in enumerate(maps.items(), start=1):
        axis = figure.add_subplot(grid[:, column])
        axis.imshow(weights.numpy(), cmap="Blues", aspect="auto", vmin=0.0, vmax=max(weights.max().item(), 1e-12))
        axis.set_title(heading, fontsize=10, fontweight="bold", color=INK, loc="left")
        _bare(axis)
        axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8, color=INK)
        axis.set_yticks([row - 0.5 for row in range(1, len(images))], minor=True)
        axis.grid(which="minor", axis="y", color=LINE)
        axis.tick_params(which="both", length=0)
    if title:
        set_title(figure, title)
    set_note(figure, "Darker: the word takes more from the image of that row. Each panel is scaled to its own maximum.")
    return figure


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color(LINE)
