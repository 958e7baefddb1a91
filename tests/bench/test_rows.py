"""Rows as CSV and as text."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.bench.rows import COLUMNS, Row, record, table
from narrows.errors import InvalidArgument

ROW = Row(
    date="2026-01-02T03:04:05+00:00",
    hardware="Some CPU (R) @ 2.0GHz",
    device="cpu",
    cores=2,
    threads=2,
    narrows="0.1.0",
    commit="abc1234",
    torch="2.15.0",
    rival_version="slot-attention 1.5.2",
    case="slot_attention/4x1369x256",
    rival="slot-attention SlotAttention",
    shapes="4x1369x256",
    dtype="float32",
    mode="eager",
    quantity="forward",
    unit="s",
    verdict="met",
    narrows_p20=0.0101,
    narrows_p50=0.0102,
    narrows_p80=0.0103,
    rival_p20=0.0301,
    rival_p50=0.0302,
    rival_p80=0.0303,
    ratio_p20=2.9,
    ratio_p50=2.96,
    ratio_p80=3.1,
    target=2.5,
)
BYTES = replace(
    ROW,
    quantity="saved",
    unit="bytes",
    verdict="",
    target=None,
    narrows_p50=2.0 * 2**20,
    rival_p50=144.0 * 2**20,
    ratio_p50=72.0,
)
WRONG = replace(
    ROW,
    quantity="agreement",
    unit="",
    verdict="disagrees",
    note='outputs differ by 1.00e-02, "far" from allowed\nline two',
    **{f"{who}_p{which}": None for who in ("narrows", "rival", "ratio") for which in (20, 50, 80)},
    target=None,
)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_round_trip(tmp_path: Path) -> None:
    (path,) = record([ROW, BYTES, WRONG], tmp_path / "results")
    assert path == tmp_path / "results" / "some-cpu-r-2-0ghz-2-cores.csv"
    back = read(path)
    assert [tuple(row) for row in back] == [COLUMNS] * 3
    for row, text in zip((ROW, BYTES, WRONG), back, strict=True):
        for column in COLUMNS:
            value = getattr(row, column)
            if isinstance(value, float):
                assert float(text[column]) == value
            else:
                assert text[column] == ("" if value is None else str(value))


def test_recording_again_appends_under_one_header(tmp_path: Path) -> None:
    record([ROW], tmp_path)
    (path,) = record([BYTES, ROW], tmp_path)
    assert [row["quantity"] for row in read(path)] == ["forward", "saved", "forward"]
    assert path.read_text().count("hardware") == 1


def test_each_machine_has_its_file(tmp_path: Path) -> None:
    gpu = replace(ROW, device="cuda", hardware="NVIDIA H200")
    assert {path.name for path in record([ROW, gpu], tmp_path)} == {"some-cpu-r-2-0ghz-2-cores.csv", "nvidia-h200.csv"}


def test_other_columns_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (path,) = record([ROW], tmp_path)
    path.write_text("case,ratio\n")
    with pytest.raises(
        InvalidArgument, match=r"folder: expected .* to have the columns date, .* got case, ratio\. Move"
    ):
        record([replace(ROW, device="cuda", hardware="NVIDIA H200"), ROW], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "case,ratio\n"


def test_table() -> None:
    lines = table([ROW, BYTES, WRONG]).splitlines()
    assert lines[0].split() == ["case", "mode", "quantity", "rival", "narrows", "ratio", "target", "verdict"]
    assert lines[2].endswith(" met")
    assert re.search(r"30.2 ms  10.2 ms  2.96 \(2.90 to 3.10\) +2.5  met", lines[2])
    assert lines[3].split()[3:] == ["144", "MiB", "2", "MiB", "72.00", "–"]
    assert lines[4].split() == ["slot_attention/4x1369x256", "eager", "agreement", *"––––", "disagrees"]
    assert lines[5].startswith("slot_attention/4x1369x256 (eager): outputs differ")


def test_the_columns_are_explained() -> None:
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    assert [column for column in COLUMNS if f"`{column}`" not in readme] == []
