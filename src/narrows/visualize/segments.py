"""Pictures of segmentations: coloured classes of pixels below their images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.visualize.canvas import INK, carrier_colour, new_figure, panel_ratio, show_picture
from narrows.visualize.images import fit, paint_owners, to_image

if TYPE_CHECKING:
    import matplotlib.figure

PANEL = 1.5


def segmentations(
    images: Iterable[object], rows: Mapping[str, Int[Tensor, "B H W"]], classes: Sequence[str], *, background: int = 0
) -> "matplotlib.figure.Figure":
    """Draw images side by side, and below each the classes of its pixels by several sources: truth and model, say.

    Every pixel has the colour of its class; the background stays grey, as do classes that are not in `classes`.

    Args:
        images: as `overlay` takes them, or a tensor `[B, 3|1, H, W]`.
        rows: by name, the class of each pixel of these images, in their order.
        classes: names of the classes.
        background: the class without a colour.

    Raises:
        InvalidArgument: no image, or a row with maps for fewer images.
        MissingExtra: without matplotlib.
    """
    canvases = [fit(to_image(image, name=f"images[{i}]")) for i, image in enumerate(images)]
    if not canvases:
        raise InvalidArgument("images", expected="at least one image", got="none")
    for name, maps in rows.items():
        if len(maps) != len(canvases):
            raise InvalidArgument(
                f"rows[{name!r}]", expected=f"a map for each of {len(canvases)} images", got=len(maps)
            )
    coloured = [label for label in range(len(classes)) if label != background]
    colours = {label: carrier_colour(rank) for rank, label in enumerate(coloured)}
    height = PANEL * max(panel_ratio(canvas) for canvas in canvases)
    figure = new_figure(PANEL * len(canvases) + 0.5, height * (1 + len(rows)) + 0.5)
    axes = figure.subplots(1 + len(rows), len(canvases), squeeze=False)
    for axis, canvas in zip(axes[0], canvases, strict=True):
        show_picture(axis, canvas)
    for row, maps in zip(axes[1:], rows.values(), strict=True):
        for axis, canvas, labels in zip(row, canvases, maps.cpu(), strict=True):
            show_picture(axis, paint_owners(canvas, labels, colours))
    for row, name in zip(axes, ("image", *rows), strict=True):
        row[0].set_ylabel(name, fontsize=10, fontweight="bold", color=INK)
    _legend(figure, {classes[label]: colour for label, colour in colours.items()})
    return figure


def _legend(figure: "matplotlib.figure.Figure", colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    columns = min(len(handles), max(1, int(1.6 * figure.get_figwidth())))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
    )
