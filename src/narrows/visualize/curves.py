"""Quality against cost for several methods, each at several settings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from narrows.errors import InvalidArgument
from narrows.visualize.canvas import new_figure
from narrows.visualize.palette import CARRIERS, INK, MUTED, PAPER
from narrows.visualize.tradeoff import ParetoPoint, style_axes

if TYPE_CHECKING:
    import matplotlib.figure

_MARKERS = "osD^vPX*"
_COLOURS = [colour for colour in CARRIERS if colour != "#f0e442"]  # yellow lines are lost on white


def curves(
    lines: Mapping[str, Sequence[ParetoPoint]], reference: ParetoPoint, *, x: str, y: str, least_span: float = 0.0
) -> "matplotlib.figure.Figure":
    """A line for each method through the points of its settings, and where it began.

    Args:
        lines: points by the name of the method.
        reference: what all of them are compared with; its quality is drawn across.
        x: what the cost is, with its unit.
        y: what the quality is, with its unit.
        least_span: of the quality axis, so that differences below what matters do not look like any.

    Raises:
        InvalidArgument: no lines, or one without points.
        MissingExtra: without matplotlib.
    """
    if not lines or not all(lines.values()):
        raise InvalidArgument("lines", expected="at least one line with at least one point", got=dict(lines))
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    axes.axhline(reference.quality, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.plot(
        reference.cost, reference.quality, "o", color=INK, markerfacecolor=PAPER, markersize=9, markeredgewidth=1.8,
        zorder=4, label=reference.name,
    )  # fmt: skip
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.cost)
        axes.plot(
            [point.cost for point in ordered],
            [point.quality for point in ordered],
            marker=_MARKERS[number % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            markersize=7,
            linewidth=1.8,
            zorder=3,
            label=name,
        )
    style_axes(axes, [reference, *(point for points in lines.values() for point in points)], x, y)
    low, high = axes.get_ylim()
    missing = max(0.0, least_span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower right")
    return figure
