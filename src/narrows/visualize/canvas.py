"""Figures, colours, panels and titles: matplotlib without pyplot, hence without a display or global state."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument, MissingExtra
from narrows.files import replacing

if TYPE_CHECKING:
    import matplotlib.figure

SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
DPI = 160


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """An empty figure of `width` by `height` inches with automatic layout that needs no display.

    Text is drawn as it is: a name with two dollar signs is no formula.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.text import Text
    except ImportError as error:
        raise MissingExtra("matplotlib", extra="viz", purpose="draw pictures") from error

    class PlainText(Figure):
        def draw(self, renderer: Any) -> None:
            for text in self.findobj(Text):
                text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
            super().draw(renderer)

    figure = PlainText(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save(figure: "matplotlib.figure.Figure", path: str | Path) -> Path:
    """Write a figure to `path`, in the format of its suffix; missing folders are created.

    Raises:
        InvalidArgument: a suffix other than .png, .svg, .pdf, .jpg, .jpeg, .webp.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidArgument("path", expected=f"a file name ending in one of {SUFFIXES}", got=repr(str(path)))
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=DPI)
    return path


# Okabe and Ito (2008), "Color Universal Design", without black, and a wine red as the eighth.
CARRIERS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#882255")
OTHER = "#a8adb5"
INK = "#1f2328"
MUTED = "#6e7681"
LINE = "#d0d7de"
PAPER = "#ffffff"


def carrier_colour(rank: int) -> str:
    """The colour of the `rank`-th carrier: the eight of `CARRIERS`, then their lighter shades, then again."""
    cycle, position = divmod(rank, len(CARRIERS))
    colour = CARRIERS[position]
    return colour if cycle % 2 == 0 else to_hex(0.5 + 0.5 * to_rgb(colour))


def to_rgb(colour: str) -> Float[Tensor, "3"]:
    """`#rrggbb` as three numbers in 0..1."""
    return torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def to_hex(rgb: Float[Tensor, "3"]) -> str:
    """Three numbers in 0..1 as `#rrggbb`."""
    return "#" + "".join(f"{int(value):02x}" for value in (rgb * 255).round())


def panel_ratio(canvas: Float[Tensor, "3 H W"]) -> float:
    """Height of a panel over its width: as of the image, but at most 1.5."""
    return min(canvas.shape[1] / canvas.shape[2], 1.5)


def show_picture(axis: Any, picture: Float[Tensor, "3 H W"], title: str = "", frame: str | None = None) -> None:
    """Draw a picture in a panel, with a frame of the colour `frame`."""
    axis.imshow(picture.movedim(0, -1).numpy(), interpolation="antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(frame is not None)
    if frame is not None:
        axis.spines[:].set(color=frame, linewidth=2.5)
    if title:
        axis.set_title(title, fontsize=9, color=INK, loc="left", pad=5)


def set_heading(axis: Any, text: str, detail: str) -> None:
    """Write a heading, and a smaller line, above a column of panels."""
    axis.set_title(text, fontsize=10, fontweight="bold", color=INK, pad=18)
    axis.annotate(detail, (0.5, 1), (0, 6), "axes fraction", "offset points", ha="center", fontsize=8, color=MUTED)


def set_title(figure: "matplotlib.figure.Figure", text: str) -> None:
    """Write the title of a figure."""
    text = fill(text, int(9 * figure.get_figwidth()))
    figure.suptitle(text, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)


def set_note(figure: "matplotlib.figure.Figure", text: str) -> None:
    """Write a note at the foot of a figure."""
    text = fill(text, int(16 * figure.get_figwidth()))
    figure.supxlabel(text, x=0.012, ha="left", fontsize=8, color=MUTED)
