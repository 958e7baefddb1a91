"""`narrows bench`: narrows against the packages people use today."""

import sys

from narrows.bench.rows import Row, table
from narrows.bench.rows import record as record_rows
from narrows.bench.runner import run as race
from narrows.cli.parsing import call


def run(arguments: list[str]) -> None:
    """Run the benchmark."""
    call(bench, arguments, first="pattern")


def bench(
    pattern: str = "*",
    device: str = "cpu",
    compile: bool | None = None,
    repeats: int = 9,
    record: str | None = None,
) -> None:
    """Time narrows and its rivals side by side, interleaved, after checking that both compute the same.

    Args:
        pattern: shell wildcard over the names of cases, for instance "slot_attention/*".
        device: where both run.
        compile: race both under torch.compile too; by default on CUDA only.
        repeats: samples of each time.
        record: folder in which the rows are kept as CSV.
    """

    def keep(row: Row) -> None:
        """As it comes: a run that is cut short keeps what it has."""
        print(f"{row.case} ({row.mode}): {row.quantity}", file=sys.stderr)
        if record is not None:
            record_rows([row], record)

    rows = race(pattern, device=device, compile=compile, repeats=repeats, on_row=keep)
    print(table(rows))
    if record is not None:
        print(f"Recorded in {record}")
