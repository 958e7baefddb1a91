"""The report: one self-contained HTML file, for offline use, phones, dark mode and print."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from narrows._version import __version__
from narrows.errors import InvalidArgument
from narrows.files import write_text
from narrows.visualize.canvas import render
from narrows.visualize.tables import best_cells, read_columns

if TYPE_CHECKING:
    import matplotlib.figure


class Report:
    """Collects text, tables and figures and writes them as one self-contained HTML file.

    Texts are plain and are escaped. Figures are embedded twice, for light and dark mode.

    Args:
        title: heading of the page.
        subtitle: a line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._blocks: list[dict[str, Any]] = []

    def section(self, title: str) -> None:
        """Begin a section."""
        self._blocks.append({"kind": "section", "text": title})

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append({"kind": "paragraph", "text": text})

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str = "",
        *,
        best: Mapping[str, str] | None = None,
    ) -> None:
        """Add a table, sortable by a click on a column's name.

        Args:
            columns: their names.
            rows: a cell for each column: a text, a number, a `Cell`, or None.
            caption: what the table shows.
            best: columns whose best value is highlighted, "max" or "min".

        Raises:
            InvalidArgument: a row with more or fewer cells than columns; `best` for a column that is not there.
        """
        best = best or {}
        for name in best:
            if name not in columns:
                raise InvalidArgument("best", expected=f"names among the columns {list(columns)}", got=repr(name))
        read = read_columns(columns, rows)
        winners = [best_cells(column, best[column.name]) if column.name in best else set() for column in read]
        self._blocks.append(
            {
                "kind": "table",
                "caption": caption,
                "columns": [(column.name, column.numeric, best.get(column.name) == "max") for column in read],
                "rows": [
                    [
                        (column.cells[i], column.numeric, i in winner)
                        for column, winner in zip(read, winners, strict=True)
                    ]
                    for i in range(len(rows))
                ],
                "has_best": any(winners),
            }
        )

    def figure(self, figure: "matplotlib.figure.Figure", caption: str = "") -> None:
        """Add a matplotlib figure as it is now; the caption is also its alternative text."""
        pictures = render(figure)
        self._blocks.append(
            {
                "kind": "figure",
                "caption": caption,
                "light": b64encode(pictures.light).decode(),
                "dark": b64encode(pictures.dark).decode(),
                "width": round(figure.get_figwidth() * 96),
            }
        )

    def write(self, path: str | Path) -> Path:
        """Write the file; missing folders are created.

        Raises:
            InvalidArgument: a file name that does not end in .html.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise InvalidArgument("path", expected="a file name ending in .html", got=repr(str(path)))
        write_text(path, self.html())
        return path

    def html(self) -> str:
        """The page as HTML."""
        source = files("narrows.visualize").joinpath("report.html.j2").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        return environment.from_string(source).render(
            title=self.title, subtitle=self.subtitle, blocks=self._blocks, version=__version__
        )
