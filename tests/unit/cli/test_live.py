"""The status line never harms the text that it shares a terminal with."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from typing import Any

import pytest

from helpers.cli_double import Stats
from lamina.cli.live import StatusLine, Terminal, fit, format_seconds


class Screen(io.StringIO):
    """A terminal of one row: understands save, restore and clear-to-the-end as a real one does."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        row, cursor, saved = "", 0, 0
        rest = self.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")
        while rest:
            for code in ("\x1b7", "\x1b8", "\x1b[K"):
                if rest.startswith(code):
                    rest = rest.removeprefix(code)
                    break
            else:
                row = row[:cursor] + rest[0] + row[cursor + 1 :]
                cursor, rest = cursor + 1, rest[1:]
                continue
            saved = cursor if code == "\x1b7" else saved
            cursor = saved if code == "\x1b8" else cursor
            row = row[:cursor] if code == "\x1b[K" else row
        return row


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    return Screen()


def test_text_written_over_a_status_is_whole(screen: Screen) -> None:
    terminal = Terminal(screen, screen, shown=True)
    for word in ("The", " capital", " of", " France"):
        terminal._draw(["token 3 50%"])
        terminal.write(word)
    assert screen.shown() == "The capital of France"
    terminal._draw(["token 3 50%"])
    assert screen.shown() == "The capital of France  token 3 50%"


def test_the_status_is_gone_when_the_block_ends(screen: Screen) -> None:
    terminal = Terminal(screen, screen, shown=True)
    with terminal.showing(lambda: ["loading"]):
        terminal._draw(["loading"])
        assert screen.shown() == "loading"
    assert screen.shown() == ""


def test_the_status_is_drawn_by_itself_while_the_block_runs(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.cli.live._INTERVAL_S", 0.001)
    import threading

    asked = threading.Event()

    def describe() -> list[str]:
        asked.set()
        return ["loading"]

    with Terminal(screen, screen, shown=True).showing(describe):
        assert asked.wait(timeout=60)
    assert screen.shown() == ""


class Cell(io.StringIO):
    """What a notebook's cell makes of what is written: a carriage return goes back to the beginning of the line."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        assert "\x1b" not in self.getvalue()
        lines = []
        for line in self.getvalue().split("\n"):
            row = ""
            for over in line.split("\r"):
                row = over + row[len(over) :]
            lines.append(row.rstrip())
        return lines


def test_a_notebook_has_one_line_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.setenv("TERM", "xterm-color")
    cell = Cell()
    terminal = Terminal(cell, cell, shown=True)
    for share in range(10):
        terminal._draw([f"loading {share}%", *["10 s left"] * (share < 9)])
    assert cell.shown() == ["loading 9%"]
    terminal.write("The capital")
    terminal._draw(["token 3 50%"])
    terminal.write(" of France\n")
    assert cell.shown() == ["The capital of France", ""]
    terminal._draw(["token 4 50%"])
    terminal.note("done")
    assert cell.shown() == ["The capital of France", "done", ""]


def test_no_color_leaves_the_colours_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", setting)
        screen = Screen()
        terminal = Terminal(screen, screen, shown=True)
        terminal._draw(["loading"])
        assert ("\x1b[2m" in screen.getvalue()) is coloured
        terminal.write("text")
        assert screen.shown() == "text"


def test_a_dumb_terminal_has_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("lamina.cli.live._INTERVAL_S", 0.001)
    screen = Screen()
    with Terminal(screen, screen, shown=True).showing(lambda: ["loading"]):
        time.sleep(0.05)
    assert screen.getvalue() == ""


def test_a_note_begins_a_line_of_its_own(screen: Screen) -> None:
    terminal = Terminal(screen, screen, shown=True)
    terminal.write("half a line")
    terminal.note("lamina: a note")
    assert screen.getvalue().endswith("half a line\nlamina: a note\n")


@pytest.mark.parametrize("shown", [True, False])
def test_without_a_terminal_nothing_is_drawn(shown: bool) -> None:
    status = io.StringIO() if shown else Screen()
    with Terminal(io.StringIO(), status, shown=shown).showing(lambda: ["loading"]):
        pass
    assert status.getvalue() == ""


@pytest.mark.parametrize(
    ("column", "line"),
    [
        (0, "aaaa · bbbb · cccc"),
        (5, "  aaaa · bbbb"),
        (12, "  aaaa"),
        (14, ""),
        (20, ""),  # the row is just full: the terminal may or may not have wrapped
        (20 + 12, "  aaaa"),
    ],
)
def test_only_what_fits_on_the_row_is_shown(column: int, line: str) -> None:
    assert fit(["aaaa", "bbbb", "cccc"], width=20, column=column) == line


class _Model:
    def __init__(self, stats: Any) -> None:
        self.lamina = self
        self.stats = stats


def test_progress_tells_the_stage_then_the_pass_then_the_time_left() -> None:
    progress = StatusLine(max_new_tokens=10)
    assert progress.describe() == ["starting"]
    progress.report("load", 25, 100)
    assert progress.describe()[:2] == ["loading 25%", "25 B of 100 B"]
    model = _Model(Stats())
    progress.watch(model)
    assert progress.describe()[:2] == ["reading the prompt 50%", "500 kB of 1.00 MB"]
    progress.count(4)
    assert progress.describe()[:3] == ["token 5 50%", "0.50 s/token", "at most 3 s left"]
    model.stats = replace(Stats(), pass_bytes_expected=0, pass_bytes_done=0)
    assert progress.describe()[0] == "token 5", "nothing is streamed when all of it is resident"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (95, "1 min 35 s"), (7260, "2 h 1 min")])
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
