"""Plots of quality against cost: Pareto fronts, and curves of several methods."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, hypot, inf, isfinite, pi, sin
from typing import TYPE_CHECKING, Any, NamedTuple

from narrows.errors import InvalidArgument
from narrows.visualize.canvas import CARRIERS, INK, LINE, MUTED, PAPER, new_figure, set_title
from narrows.visualize.drawing import POINT

if TYPE_CHECKING:
    import matplotlib.figure


class Box(NamedTuple):
    """An axis-aligned rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area of the intersection."""
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
    """A box for the label of each anchor, near it and inside `area`, that covers neither obstacles nor other labels.

    Greedy: for each anchor in turn, `distances` are tried in sixteen directions, nearest and rightmost first. If all
    cover something, the one that covers least is taken.
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


FRONT = "#0072b2"
WIDE_RANGE = 8.0
EVERYTHING = (-inf, inf)


@dataclass(frozen=True)
class ParetoPoint:
    """The cost and the quality of one option.

    Args:
        name: its label.
        cost: positive; lower is better.
        quality: higher is better.
        spread: half the length of the error bar, for instance of a 95 % interval; 0 draws none.
        note: what else a report says of the point where it is pointed at.
    """

    name: str
    cost: int | float
    quality: int | float
    spread: int | float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if not (isfinite(self.cost) and self.cost > 0):
            raise InvalidArgument("cost", expected="a positive number", got=f"{self.cost} for {self.name!r}")
        if not isfinite(self.quality):
            raise InvalidArgument("quality", expected="a finite number", got=f"{self.quality} for {self.name!r}")
        if not (isfinite(self.spread) and self.spread >= 0):
            raise InvalidArgument("spread", expected="a number, not negative", got=f"{self.spread} for {self.name!r}")


def pareto_front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """The points of more quality than every cheaper one, by more than the spread of both; cheapest first."""
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.quality)):
        if not front or point.quality - front[-1].quality > hypot(point.spread, front[-1].spread):
            front.append(point)
    return front


def pareto(
    points: Sequence[ParetoPoint], *, x: str, y: str, title: str = "", bounds: tuple[float, float] = EVERYTHING
) -> "matplotlib.figure.Figure":
    """Plot quality against cost, with labelled points and the Pareto front as a step line.

    The cost axis is logarithmic where costs differ by more than a factor of eight.

    Args:
        points: at least one.
        x: what the cost is, with its unit ("MACs per image").
        y: what the quality is, with its unit ("accuracy, %").
        title: above the plot.
        bounds: the least and the greatest quality there can be, (0, 100) of percentages: axis and error bars end there.

    Raises:
        InvalidArgument: no points, or a point whose numbers are not finite.
        MissingExtra: without matplotlib.
    """
    if not points:
        raise InvalidArgument("points", expected="at least one ParetoPoint", got="none")
    front = pareto_front(points)
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for point in points:
        colour = FRONT if point in front else MUTED
        axes.errorbar(
            point.cost,
            point.quality,
            yerr=_bar(point, bounds) if point.spread else None,
            fmt="o",
            color=colour,
            markersize=7,
            markerfacecolor=colour if point in front else PAPER,
            markeredgewidth=1.5,
            elinewidth=1.2,
            capsize=3,
            zorder=3,
            clip_on=False,
        )
    style_axes(axes, points, x, y, bounds)
    if title:
        set_title(figure, title)
    corners = _front_line(front, right=axes.get_xlim()[1])
    axes.plot(*zip(*corners, strict=True), color=FRONT, linewidth=1.5, alpha=0.6, zorder=2, scalex=False, scaley=False)
    axes.annotate(
        "↖ cheaper and better", (0, 1), (6, -6), "axes fraction", "offset points", va="top", fontsize=9, color=MUTED
    )
    _name_points(figure, axes, points, front, corners)
    _tell(axes, points, x, y)
    return figure


def _front_line(front: Sequence[ParetoPoint], right: float) -> list[tuple[int | float, int | float]]:
    """The corners of the step line: level from each point to the next cost, then up."""
    corners = [(front[0].cost, front[0].quality)]
    for before, point in pairwise(front):
        corners += [(point.cost, before.quality), (point.cost, point.quality)]
    return [*corners, (right, front[-1].quality)]


def _bar(point: ParetoPoint, bounds: tuple[float, float]) -> list[list[float]]:
    """How far the error bar goes down and up: as far as there can be quality."""
    room = (point.quality - bounds[0], bounds[1] - point.quality)
    return [[max(0.0, min(point.spread, each))] for each in room]


def _tell(axes: Any, points: Sequence[ParetoPoint], x: str, y: str) -> None:
    """Let a report say what each point is where it is pointed at: an unseen mark, larger than the seen one."""
    from matplotlib.ticker import EngFormatter

    for point in points:
        spread = f" ± {point.spread:.3g}" if point.spread else ""
        told = f"{point.name} · {y}: {point.quality:.4g}{spread} · {x}: {EngFormatter(places=2)(point.cost)}"
        note = f" · {point.note}" if point.note else ""
        axes.plot(
            point.cost, point.quality, "o", markersize=18, alpha=0, zorder=6, gid=f"{POINT}{told}{note}",
            scalex=False, scaley=False, clip_on=False,
        )  # fmt: skip


def style_axes(axes: Any, points: Sequence[ParetoPoint], x: str, y: str, bounds: tuple[float, float]) -> None:
    """Axes without clutter, with room around these points; logarithmic cost where it varies much."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    costs = [point.cost for point in points]
    if max(costs) / min(costs) > WIDE_RANGE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(0.14, 0.16)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, bounds[0]), min(high, bounds[1]))
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=9)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def _name_points(
    figure: Any,
    axes: Any,
    points: Sequence[ParetoPoint],
    front: Sequence[ParetoPoint],
    corners: Sequence[tuple[int | float, int | float]],
) -> None:
    """Label the points where nothing is covered, with a thin line to points that are not next to their label."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels placed in pixels need axes that do not move
    renderer = figure.canvas.get_renderer()
    to_pixels = axes.transData.transform
    unit = figure.dpi / 72

    hint = Box(*axes.texts[0].get_window_extent(renderer).extents)
    marks = [_mark(to_pixels, point, 6 * unit) for point in points]
    line = [_segment(to_pixels(a), to_pixels(b), unit) for a, b in pairwise(corners)]
    texts = [
        axes.annotate(
            point.name,
            (point.cost, point.quality),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            parse_math=False,  # measured below, before the figure is drawn
            color=INK if point in front else MUTED,
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4},
        )
        for point in points
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    anchors = [tuple(to_pixels((point.cost, point.quality))) for point in points]
    boxes = place_labels(
        anchors,
        [(extent.width + 4 * unit, extent.height + 2 * unit) for extent in extents],
        [hint, *marks, *line],
        Box(*axes.bbox.extents),
        distances=[distance * unit for distance in (7, 14, 24, 36, 50, 66, 84)],
    )
    for text, (x, y), box in zip(texts, anchors, boxes, strict=True):
        dx, dy = (box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y
        text.xyann = (dx / unit, dy / unit)
        gap = max(abs(dx) - (box.right - box.left) / 2, abs(dy) - (box.top - box.bottom) / 2)
        text.arrow_patch.set_visible(gap > 12 * unit)


def _mark(to_pixels: Any, point: ParetoPoint, radius: float) -> Box:
    """The box of a point's marker and error bar."""
    x, low = to_pixels((point.cost, point.quality - point.spread))
    _, high = to_pixels((point.cost, point.quality + point.spread))
    return Box(x - radius, low - radius, x + radius, high + radius)


def _segment(a: Any, b: Any, width: float) -> Box:
    return Box(min(a[0], b[0]) - width, min(a[1], b[1]) - width, max(a[0], b[0]) + width, max(a[1], b[1]) + width)


_MARKERS = "osD^vPX*"
_COLOURS = [colour for colour in CARRIERS if colour != "#f0e442"]  # yellow lines do not show on white


def curves(
    lines: Mapping[str, Sequence[ParetoPoint]],
    reference: ParetoPoint,
    *,
    x: str,
    y: str,
    least_span: float = 0.0,
    bounds: tuple[float, float] = EVERYTHING,
) -> "matplotlib.figure.Figure":
    """Plot quality against cost: a line for each method through its settings, and a reference point.

    Args:
        lines: points by the name of the method.
        reference: compared with all of them; its quality is drawn as a horizontal line.
        x: label of the cost, with its unit.
        y: label of the quality, with its unit.
        least_span: smallest extent of the quality axis, so that negligible differences look so.
        bounds: the least and the greatest quality there can be, (0, 100) of percentages: the axis ends there.

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
        zorder=4, label=reference.name, clip_on=False,
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
            clip_on=False,
        )
    every = [reference, *(point for points in lines.values() for point in points)]
    style_axes(axes, every, x, y, bounds)
    low, high = axes.get_ylim()
    high = min(bounds[1], high + max(0.0, least_span - (high - low)) / 2)
    axes.set_ylim(max(bounds[0], min(low, high - least_span)), high)
    _tell(axes, every, x, y)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower right")
    return figure
