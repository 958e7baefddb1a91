"""Text tables, and the formatting of cells that they share with the report."""

from collections.abc import Sequence
from math import ceil, isfinite, log10
from typing import NamedTuple

from narrows.errors import InvalidArgument

NOTHING = "–"


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
