"""Notes and bars: on a terminal, in a file, where it is quiet, and without colours."""

import io
import re
import sys

import pytest

from narrows import screen


class Terminal(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Puts a terminal in the place of stderr; what is written to it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    screen.console.cache_clear()

    def install() -> Terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    yield install
    screen.console.cache_clear()


def _work(label="1/6 soft_moe_vit_mini seed 3 of many more") -> None:
    with screen.Bar(label, 123456, done=3) as bar:
        screen.say("a note with [brackets] and :smile:")
        bar.advance(12345)
        bar.tail("loss 1.23, held-out 95.6 %")


def test_in_a_file_there_are_lines_without_control_characters(capsys, monkeypatch):
    monkeypatch.setattr(screen, "PAUSE", 0.0)
    _work("training")
    assert list(screen.track([1, 2], "passing by")) == [1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "a note with [brackets] and :smile:",
        "training: 12,348/123,456 steps, 0 s",
        "training: 12,348/123,456 steps, 0 s, loss 1.23, held-out 95.6 %",
    ]


def test_a_bar_in_a_file_pauses(capsys):
    with screen.Bar("training", 500) as bar:
        for _ in range(500):
            bar.advance()
    assert capsys.readouterr().err == "training: 500/500 steps, 0 s\n"


def test_on_a_terminal_a_bar_is_one_line_of_80_columns(on_a_terminal):
    terminal = on_a_terminal()
    _work()
    shown = terminal.getvalue()
    assert "a note with [brackets] and :smile:" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    *_, last = [line for line in re.split(r"[\r\n]", plain) if "95.6" in line]
    assert len(last) <= 80
    assert "1/6 soft_moe_vit_mini" in last
    assert "12348/123456" in last
    assert last.rstrip().endswith("loss 1.23, held-out 95.6 %")


def test_no_color_is_honoured(on_a_terminal, monkeypatch):
    terminal = on_a_terminal()
    screen.say("careful", "red")
    assert "\x1b[31mcareful" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    screen.console.cache_clear()
    screen.say("again", "red")
    _work()
    assert terminal.getvalue().count("\x1b[31m") == 1
    assert not [code for code in terminal.getvalue().split("\x1b[")[2:] if code.startswith(("3", "9"))]


def test_where_it_is_quiet_only_errors_are_told(capsys):
    with screen.quiet():
        _work()
        with screen.quiet(False):
            screen.say("unheard")
        screen.tell("an error")
    assert capsys.readouterr().err == "an error\n"
    screen.say("heard")
    assert capsys.readouterr().err == "heard\n"


def test_a_bar_without_a_total_counts(capsys):
    with screen.Bar("looking", unit="images") as bar:
        bar.advance(7)
    assert capsys.readouterr().err == "looking: 7 images, 0 s\n"
