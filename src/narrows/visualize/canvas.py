"""The only place that makes matplotlib figures and turns them into files. No pyplot, no global state."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from narrows.errors import InvalidArgument, MissingExtra
from narrows.visualize.palette import PAPER

if TYPE_CHECKING:
    import matplotlib.figure

SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
DPI = 160


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """An empty figure of `width` by `height` inches that lays itself out and draws without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingExtra("matplotlib", extra="viz", purpose="draw pictures") from error
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save(figure: "matplotlib.figure.Figure", path: str | Path) -> Path:
    """Write a figure to `path`, in the format its suffix names; missing folders are made.

    Raises:
        InvalidArgument: a suffix other than .png, .svg, .pdf, .jpg, .jpeg, .webp.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidArgument("path", expected=f"a file name ending in one of {SUFFIXES}", got=repr(str(path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


class Renderings(NamedTuple):
    """One figure as two PNGs without background, alike but for the ink: dark on light and light on dark."""

    light: bytes
    dark: bytes


def render(figure: "matplotlib.figure.Figure") -> Renderings:
    """The figure for light and for dark pages; what is black or grey in one is white or light grey in the other."""
    # Laying out again would move things a little: both pictures take the places of this one draft.
    figure.draw_without_rendering()
    layout = figure.get_layout_engine()
    figure.set_layout_engine("none")
    light = _png(figure)
    inks = list(_inks(figure))
    for recolour, colour in inks:
        recolour(_inverted(colour))
    dark = _png(figure)
    for recolour, colour in inks:
        recolour(colour)
    figure.set_layout_engine(layout)
    return Renderings(light, dark)


def _png(figure: "matplotlib.figure.Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def _inks(figure: "matplotlib.figure.Figure") -> Iterator[tuple[Any, Any]]:
    """Every colour of the figure's texts, lines and shapes, each with the setter that puts another in its place."""
    for artist in figure.findobj():
        for ink in ("color", "edgecolor", "facecolor", "markeredgecolor", "markerfacecolor"):
            if hasattr(artist, f"get_{ink}") and hasattr(artist, f"set_{ink}"):
                yield getattr(artist, f"set_{ink}"), getattr(artist, f"get_{ink}")()


def _inverted(colour: Any) -> Any:
    """White for black and black for white; what is neither grey nor near it stays."""
    from matplotlib.colors import is_color_like, to_rgba

    if not is_color_like(colour):
        return [_inverted(each) for each in colour]
    red, green, blue, alpha = to_rgba(colour)
    if max(red, green, blue) - min(red, green, blue) > 0.12:
        return (red, green, blue, alpha)
    return (1 - red, 1 - green, 1 - blue, alpha)
