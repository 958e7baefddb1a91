"""Tables for the terminal."""

import pytest

from narrows.errors import InvalidArgument
from narrows.visualize import Cell, text_table


def test_texts_stand_left_and_numbers_right() -> None:
    rows = [
        ["vit", Cell(0.968, "96.8 ± 0.4 %"), 5120, 0.5, None],
        ["soft_moe_vit", Cell(0.9, "90 %"), 17, 12.25, "slow"],
    ]
    assert text_table(["model", "accuracy", "images/s", "x", "note"], rows) == (
        "model             accuracy  images/s      x  note\n"
        "------------  ------------  --------  -----  ----\n"
        "vit           96.8 ± 0.4 %     5,120   0.50  –\n"
        "soft_moe_vit          90 %        17  12.25  slow"
    )


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.95612, 0.9], ["0.9561", "0.9000"]),
        ([1234567.8, 5.0], ["1,234,568", "5"]),
        ([3, 1200], ["3", "1,200"]),
        ([1, 2.5], ["1.000", "2.500"]),
        ([0.0, 0.0], ["0.0", "0.0"]),
        ([float("nan"), 2], ["–", "2"]),
        ([float("inf"), 2.5], ["inf", "2.500"]),
        ([True, False], ["yes", "no"]),
    ],
)
def test_numbers_of_a_column_have_the_same_number_of_decimals(values: list, texts: list[str]) -> None:
    lines = text_table(["a column"], [[value] for value in values]).splitlines()
    assert [line.strip() for line in lines[2:]] == texts


def test_a_table_without_rows_is_its_heading() -> None:
    assert text_table(["model", "cost"], []) == "model  cost\n-----  ----"


def test_a_row_of_other_length_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"rows\[1\]: expected 2 cells, \['a', 'b'\], got \[3\]"):
        text_table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(InvalidArgument, match="columns: expected at least one name, got none"):
        text_table([], [])
