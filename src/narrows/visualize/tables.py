"""Tables as text and on a screen, and the formatting of cells that they share with the report."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite, log10
from typing import TYPE_CHECKING, NamedTuple

from narrows.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"
GAP = 2
"""Blanks between columns."""


class Cell(NamedTuple):
    """A number with a text of its own: `Cell(0.956, "95.6 ± 0.3 %")`.

    Args:
        value: to sort and compare by; None sorts last.
        text: what is shown.
    """

    value: float | None
    text: str


class Column(NamedTuple):
    """A formatted column; columns of numbers are right-aligned."""

    name: str
    cells: list[Cell]
    numeric: bool


class ScreenTable(NamedTuple):
    """A table to be printed on a screen.

    Args:
        columns: heads, and for those whose best value stands out whether that is the "max" or the "min".
        rows: cells as `text_table` takes them.
        names: columns at the left that say what a row is about: they come again where the table goes on below.
        title: above it.
    """

    columns: Mapping[str, str | None]
    rows: Sequence[Sequence[object]]
    names: int = 1
    title: str = ""

    def print(self, console: "Console") -> None:
        """Print it, in as many parts below each other as the width asks for, so that no cell is broken."""
        from rich.table import Table
        from rich.text import Text

        columns = read_columns(list(self.columns), self.rows)
        widths = [_width(column) for column in columns]
        best = [
            best_cells(column, which) if which is not None and len(self.rows) > 1 else set()
            for column, which in zip(columns, self.columns.values(), strict=True)
        ]
        if self.title:
            console.print(Text(self.title, style="bold"))
        for number, part in enumerate(parts(widths, self.names, console.width)):
            if number:
                console.print()
            shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
            # The heads on one line where there is room for all of them.
            whole = {index: max(widths[index], len(columns[index].name)) for index in part}
            room = console.width - GAP * (len(part) - 1)
            chosen = whole if sum(whole.values()) <= room else {index: widths[index] for index in part}
            for index in part:
                side = "right" if columns[index].numeric else "left"
                shown.add_column(Text(columns[index].name), justify=side, width=chosen[index], overflow="fold")
            for row in range(len(self.rows)):
                texts = [(columns[index].cells[row].text, row in best[index]) for index in part]
                shown.add_row(*(Text(text, style="bold green" if is_best else "") for text, is_best in texts))
            with console.capture() as captured:
                console.print(shown)
            console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def parts(widths: Sequence[int], names: int, width: int) -> list[list[int]]:
    """Which columns stand side by side, those of the `names` in every part.

    >>> parts([10, 8, 8, 8], names=1, width=30)
    [[0, 1, 2], [0, 3]]
    """
    first = list(range(names))
    room = width - sum(widths[:names]) - GAP * names
    found: list[list[int]] = [[]]
    used = 0
    for index in range(names, len(widths)):
        wanted = widths[index] + (GAP if found[-1] else 0)
        if found[-1] and used + wanted > room:
            found.append([])
            used, wanted = 0, widths[index]
        found[-1].append(index)
        used += wanted
    return [[*first, *part] for part in found]


def _width(column: Column) -> int:
    """Of the longest cell, or of the longest word of the head, which may stand on two lines."""
    return max(map(len, ["", *column.name.split(), *(cell.text for cell in column.cells)]))


def text_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as plain text with aligned columns.

    Args:
        columns: their names.
        rows: a cell for each column: a text, a number, a `Cell`, or None.

    Raises:
        InvalidArgument: a row with more or fewer cells than columns.

    >>> print(text_table(["model", "accuracy", "images/s"], [["vit", 0.968, 5120], ["ats_vit", 0.9612, 7311]]))
    model    accuracy  images/s
    -------  --------  --------
    vit        0.9680     5,120
    ats_vit    0.9612     7,311
    """
    aligned = []
    for column in read_columns(columns, rows):
        texts = [column.name, *(cell.text for cell in column.cells)]
        width = max(map(len, texts))
        texts.insert(1, "-" * width)
        aligned.append([text.rjust(width) if column.numeric else text.ljust(width) for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def read_columns(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[Column]:
    """The columns as `Cell`s, with the same number of decimals throughout a column."""
    if not columns:
        raise InvalidArgument("columns", expected="at least one name", got="none")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise InvalidArgument(f"rows[{number}]", expected=f"{len(columns)} cells, {list(columns)}", got=list(row))
    return [_read_column(name, [row[i] for row in rows]) for i, name in enumerate(columns)]


def best_cells(column: Column, best: str) -> set[int]:
    """The rows with the greatest (`best="max"`) or smallest ("min") value in `column`."""
    if best not in ("max", "min"):
        raise InvalidArgument("best", expected="'max' or 'min' for each column", got=f"{best!r} for {column.name!r}")
    values = {i: cell.value for i, cell in enumerate(column.cells) if cell.value is not None}
    if not values:
        return set()
    target = max(values.values()) if best == "max" else min(values.values())
    return {i for i, value in values.items() if value == target}


def _read_column(name: str, values: list[object]) -> Column:
    numbers = [value for value in values if _is_number(value)]
    decimals = _decimals(numbers)
    cells = [_read_cell(value, decimals) for value in values]
    filled = [cell for cell, value in zip(cells, values, strict=True) if cell.text != NOTHING]
    return Column(name, cells, numeric=bool(filled) and all(cell.value is not None for cell in filled))


def _read_cell(value: object, decimals: int) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None or value != value:
        return Cell(None, NOTHING)
    if isinstance(value, bool):
        return Cell(None, "yes" if value else "no")
    if isinstance(value, (int, float)):
        return Cell(value, f"{value:,.{decimals}f}" if isfinite(value) else str(value))
    return Cell(None, str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _decimals(numbers: list) -> int:
    """Enough for four significant figures of the largest number; none for integers."""
    if all(isinstance(number, int) for number in numbers):
        return 0
    largest = max(abs(number) for number in numbers)
    return min(6, max(0, 4 - ceil(log10(largest)))) if largest > 0 else 1
