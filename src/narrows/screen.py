"""What narrows says while it works: notes and bars on stderr. Results are for the caller, and commands print them.

On a terminal bars move, in colours unless `NO_COLOR` is set. In a file or a pipe there are plain lines, now and then.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

PAUSE = 10.0
"""Seconds between two lines of a bar that does not move."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_Item = TypeVar("_Item")


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """No notes and no bars inside."""
    token = _quiet.set(on or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def say(text: str, style: str = "") -> None:
    """A note on stderr, above the bar if there is one; in a file without line breaks of its own.

    Args:
        text: any text; nothing in it is read as markup.
        style: of rich, on a terminal: "yellow" for what may be wrong.
    """
    if not _quiet.get():
        tell(text, style)


def tell(text: str, style: str = "") -> None:
    """As `say`, and said even where it is quiet: an error."""
    if sys.stderr is None:
        return
    if sys.stderr.isatty():
        console().print(text, style=style, markup=False, highlight=False, emoji=False)
    else:
        print(text, file=sys.stderr, flush=True)


@cache
def console() -> "Console":
    """The one console on stderr, which keeps notes and bars apart."""
    from rich.console import Console

    return Console(stderr=True)


class Bar:
    """How far something is.

    Args:
        label: what is done.
        total: steps that it takes; None if nobody knows.
        unit: what a step is, in the plural.
        done: steps that were made before.
        keep: the bar stays when it is full. One that does not stay is shown on a terminal only.
    """

    def __init__(
        self, label: str, total: int | None = None, *, unit: str = "steps", done: int = 0, keep: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._tail, self._start = "", time.monotonic()
        self._told = self._start
        self._progress = None
        self._lines = False
        if _quiet.get() or sys.stderr is None:
            return
        if not sys.stderr.isatty():
            self._lines = keep
            return
        from rich.progress import Progress

        self._progress = Progress(*_columns(), console=console(), transient=not keep, refresh_per_second=4)
        self._task = self._progress.add_task(label, total=total, completed=done, unit=unit, tail="")
        self._progress.start()

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done."""
        self.done += steps
        if self._progress is not None:
            self._progress.advance(self._task, steps)
        elif self._lines and time.monotonic() - self._told >= PAUSE:
            self._line()

    def tail(self, text: str) -> None:
        """What stands at the right, a loss for instance."""
        self._tail = text
        if self._progress is not None:
            self._progress.update(self._task, tail=text)

    def close(self) -> None:
        """Nothing more will come; twice is as once."""
        if self._progress is not None:
            self._progress.stop()
        elif self._lines:
            self._line()
        self._progress, self._lines = None, False

    def _line(self) -> None:
        self._told = time.monotonic()
        seconds = round(self._told - self._start)
        total = f"/{self.total:,}" if self.total is not None else ""
        took = f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
        say(", ".join(filter(None, (f"{self.label}: {self.done:,}{total} {self.unit}", took, self._tail))))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(
    items: Iterable[_Item], label: str, *, total: int | None = None, unit: str = "steps", keep: bool = False
) -> Iterator[_Item]:
    """The items, with a bar over them; `Bar` says what the arguments are."""
    count = len(items) if total is None and isinstance(items, Sequence) else total
    with Bar(label, count, unit=unit, keep=keep) as bar:
        for item in items:
            yield item
            bar.advance()


def _columns() -> "list[ProgressColumn]":
    """Of a bar: the label gives way first, then the bar itself, so that 80 columns hold a line."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def column(width: int | None = None) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", max_width=width)

    return [
        TextColumn("{task.description}", markup=False, table_column=column(28)),
        BarColumn(bar_width=None, table_column=Column(max_width=24)),
        MofNCompleteColumn(table_column=column()),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=column()),
        TextColumn("{task.fields[tail]}", markup=False, style="bold", table_column=column()),
    ]
