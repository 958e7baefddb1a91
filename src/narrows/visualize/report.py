"""The report: one self-contained HTML file, for offline use, phones, dark mode and print."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from narrows._version import __version__
from narrows.errors import InvalidArgument
from narrows.files import write_text
from narrows.visualize.drawing import Drawing, draw, encode
from narrows.visualize.tables import best_cells, read_columns

if TYPE_CHECKING:
    import matplotlib.figure

PICTURE_BYTES = 1_500_000
"""Bytes of all pictures of a report together; more of them are smaller."""


class Report:
    """Collects text, tables and figures and writes them as one self-contained HTML file.

    Texts are plain and are escaped. Figures are drawings whose ink follows light and dark mode; the pictures in them
    get smaller where there are many, so that a report stays below 2 MB.

    Args:
        title: heading of the page.
        subtitle: a line below it.
        verdict: what was found, in a sentence or two, and how sure it is; stands before everything else.
        facts: how it was made: date, command, machine, versions, by what each is called.
    """

    def __init__(
        self, title: str, subtitle: str = "", *, verdict: str = "", facts: Mapping[str, str] | None = None
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.verdict = verdict
        self.facts = dict(facts or {})
        self._blocks: list[dict[str, Any]] = []

    def section(self, title: str) -> None:
        """Begin a section."""
        self._blocks.append({"kind": "section", "text": title})

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append({"kind": "paragraph", "text": text})

    def code(self, text: str) -> None:
        """Add code, with a button that copies it."""
        self._blocks.append({"kind": "code", "text": text})

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str = "",
        *,
        best: Mapping[str, str] | None = None,
        codes: Sequence[str] | None = None,
    ) -> None:
        """Add a table, sortable by a click on a column's name.

        Args:
            columns: their names.
            rows: a cell for each column: a text, a number, a `Cell`, or None.
            caption: what the table shows.
            best: columns whose best value is highlighted, "max" or "min".
            codes: for each row the code that does the same again, which a button copies; "" where there is none.

        Raises:
            InvalidArgument: a row with more or fewer cells than columns; `best` for a column that is not there; codes
                of another number than rows.
        """
        best = best or {}
        for name in best:
            if name not in columns:
                raise InvalidArgument("best", expected=f"names among the columns {list(columns)}", got=repr(name))
        if codes is not None and len(codes) != len(rows):
            raise InvalidArgument("codes", expected=f"one for each of the {len(rows)} rows", got=len(codes))
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
                "codes": codes,
            }
        )

    def figure(self, figure: "matplotlib.figure.Figure", caption: str = "", *, alt: str = "") -> None:
        """Add a matplotlib figure as it is now.

        Args:
            figure: it.
            caption: what to know to read it.
            alt: what is seen, for those who do not see it; by default the caption.
        """
        drawing = draw(figure, alt=alt or caption, name=f"f{len(self._blocks)}")
        self._blocks.append({"kind": "figure", "caption": caption, "drawing": drawing})

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
        drawings: list[Drawing] = [block["drawing"] for block in self._blocks if block["kind"] == "figure"]
        urls = iter(encode([picture for drawing in drawings for picture in drawing.pictures], PICTURE_BYTES))
        filled = iter([drawing.filled([next(urls) for _ in drawing.pictures]) for drawing in drawings])
        # What `draw` makes is escaped already.
        blocks = [{**block, "svg": Markup(next(filled))} if "drawing" in block else block for block in self._blocks]
        return environment.from_string(source).render(
            title=self.title,
            subtitle=self.subtitle,
            verdict=self.verdict,
            facts=self.facts,
            blocks=blocks,
            version=__version__,
        )
