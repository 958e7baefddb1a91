"""Pictures in their panels, and the words around them."""

from textwrap import fill
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from narrows.visualize.palette import INK, MUTED

if TYPE_CHECKING:
    import matplotlib.figure


def ratio(canvas: Float[Tensor, "3 H W"]) -> float:
    """Height of a panel for its width: the image's own, though a tall image does not make a tower of the figure."""
    return min(canvas.shape[1] / canvas.shape[2], 1.5)


def show(axis: Any, picture: Float[Tensor, "3 H W"], title: str = "", frame: str | None = None) -> None:
    """A picture in its panel, with `frame` as the colour of a line around it."""
    axis.imshow(picture.movedim(0, -1).numpy(), interpolation="auto")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(frame is not None)
    if frame is not None:
        axis.spines[:].set(color=frame, linewidth=2.5)
    if title:
        axis.set_title(title, fontsize=9, color=INK, loc="left", pad=5)


def heading(axis: Any, text: str, detail: str) -> None:
    """What a column of panels shows, above its first one."""
    axis.set_title(text, fontsize=10, fontweight="bold", color=INK, pad=18)
    axis.annotate(detail, (0.5, 1), (0, 6), "axes fraction", "offset points", ha="center", fontsize=8, color=MUTED)


def title(figure: "matplotlib.figure.Figure", text: str) -> None:
    """The title of a figure."""
    text = fill(text, int(9 * figure.get_figwidth()))
    figure.suptitle(text, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)


def note(figure: "matplotlib.figure.Figure", text: str) -> None:
    """How to read a figure, at its foot."""
    text = fill(text, int(16 * figure.get_figwidth()))
    figure.supxlabel(text, x=0.012, ha="left", fontsize=8, color=MUTED)
