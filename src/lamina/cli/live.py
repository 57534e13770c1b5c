"""A sign of life: one status line on the terminal, drawn at the cursor and taken away before anything else is written.

It says the stage of loading, then the pass that is under way.
Text that streams to the same terminal stays whole: the line is drawn only where it fits beside what already stands
on the current row, and both go through one lock. Without a terminal on stderr nothing is drawn.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from time import monotonic as now
from typing import IO, Any

from lamina.cli import interrupt, output
from lamina.sizes import format_rate, format_seconds, format_size

_INTERVAL_S = 0.25
_SAVE, _RESTORE_AND_CLEAR = "\x1b7", "\x1b8\x1b[K"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
    """Where text and the status line meet: `write` for the one, `describe` asked four times a second for the other.

    Only the command line draws, so its clock is here too: a daemon thread that touches nothing but the terminal.
    """

    def __init__(self, text: IO[str], status: IO[str], *, shown: bool) -> None:
        self._text = text
        self._status = status
        self._shared = text.isatty()  # the text's cursor is then the one that the status is drawn at
        self._quiet = not shown
        self._shown = shown and status.isatty() and not self._console.is_dumb_terminal
        self._notebook = in_notebook()
        self._lock = threading.RLock()  # Ctrl-C may come while it is held, and clears as well
        self._drawn = 0  # letters of the status line that stands there
        self._column = 0

    def write(self, piece: str) -> None:
        """Write text at once; it is never mixed up with the status."""
        with self._lock:
            self._clear()
            output.write(self._text, piece, now=True)
            if self._shared:
                from rich.cells import cell_len

                line = piece.rpartition("\n")[2]
                self._column = cell_len(line) + (0 if "\n" in piece else self._column)

    def note(self, line: str) -> None:
        """A whole line of progress or a note, beside the text."""
        with self._lock:
            self._clear()
            if self._shared and self._column:
                self.write("\n")
            output.tell(line, self._status)

    @contextmanager
    def showing(self, describe: Callable[[], list[str]]) -> Iterator[None]:
        """Keep the status line up to date with `describe()`, most important part first, while the block runs.

        What the library has to tell meanwhile (such as what it is about to write) is shown as lines.
        """
        with nullcontext() if self._quiet else _told(self), self._drawing(describe) if self._shown else nullcontext():
            yield

    @contextmanager
    def _drawing(self, describe: Callable[[], list[str]]) -> Iterator[None]:
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(_INTERVAL_S):
                with self._lock:
                    if not ended.is_set():
                        self._draw(describe())

        clock = threading.Thread(target=tick, name="lamina-status", daemon=True)
        clock.start()
        interrupt.before_leaving = self._leave
        try:
            yield
        finally:
            interrupt.before_leaving = None
            ended.set()
            clock.join()
            with self._lock:
                self._clear()

    def _draw(self, parts: list[str]) -> None:
        self._clear()
        if self._notebook and self._column:  # it cannot go back to anywhere but the beginning of the line
            return
        line = fit(parts, self._console.width, self._column)
        if line:
            self._drawn = len(line)
            self._send(f"\r{line}" if self._notebook else f"{_SAVE}{self._dim(line)}")

    def _dim(self, line: str) -> str:
        """The line as the terminal and the user (NO_COLOR) want it."""
        colours = self._console.color_system is not None and not self._console.no_color
        return f"{_DIM}{line}{_PLAIN}" if colours else line

    def _leave(self) -> None:
        """Called when Ctrl-C ends the process as it is."""
        if self._lock.acquire(timeout=1):
            self._clear()

    def _clear(self) -> None:
        if self._drawn:
            self._send(f"\r{' ' * self._drawn}\r" if self._notebook else _RESTORE_AND_CLEAR)
            self._drawn = 0

    def _send(self, codes: str) -> None:
        with suppress(OSError):  # the terminal is gone: the result may go elsewhere
            self._status.write(codes)
            self._status.flush()

    @cached_property
    def _console(self) -> Any:
        """What rich knows of the terminal; it is imported where there is one."""
        from rich.console import Console

        return Console(file=self._status)


def fit(parts: list[str], width: int, column: int) -> str:
    """As many of `parts` as fit between `column` and the end of the row; nothing where a row is just full."""
    position = column % width
    if column and position == 0:  # the terminal may or may not have wrapped yet
        return ""
    lead = "  " if position else ""
    room = width - position - 1
    while parts:
        line = lead + " · ".join(parts)
        if len(line) <= room:
            return line
        parts = parts[:-1]
    return ""


class _Telling(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.note(f"lamina: {record.getMessage()}")


@contextmanager
def _told(terminal: Terminal) -> Iterator[None]:
    log, handler = logging.getLogger("lamina"), _Telling(terminal)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def in_notebook() -> bool:
    """Whether what is written is shown in a notebook's cell, which knows no codes of a terminal but the colours.

    `!lamina ...` has a terminal there, with nothing but its surroundings to tell it from others.
    """
    names = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "DATABRICKS_RUNTIME_VERSION")
    return "ipykernel" in sys.modules or any(name in os.environ for name in names)


def stdio(*, json: bool, quiet: bool) -> Terminal:
    """The terminal of this process: text on stdout, or nowhere near it when stdout is for one JSON object."""
    return Terminal(sys.stderr if json else sys.stdout, sys.stderr, shown=not quiet)


_STAGES = {
    "download": "downloading",
    "load": "loading",
    "check": "checking what is there",
    "split": "splitting",
    "verify": "verifying",
    "wait": "waiting for another process that writes the same folder",
}


class StatusLine:
    """Gathers the numbers: `report` is called while loading, `watch` gives the model whose passes then count.

    Attributes:
        seconds: from the beginning of an answer to its last token.
        seconds_to_first_token: None where none came.
        note: said instead of the numbers while it is set.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._stage: tuple[str, int, int] = ("starting", 0, 0)
        self._stage_began = self._pass_began = now()
        self._stage_from = 0  # bytes that were there when it began
        self._model: Any = None
        self._pass = -1
        self.note: str | None = None
        self.begin()

    def report(self, stage: str, done: int, total: int) -> None:
        """The `progress` argument of `from_pretrained`: bytes done of `total` in `stage`."""
        if stage != self._stage[0]:
            self._stage_began, self._stage_from = now(), done
        self._stage = (stage, done, total)

    def watch(self, model: Any) -> None:
        """From here on, passes of this model are what is shown."""
        self._model = model

    def begin(self) -> None:
        """A new answer begins."""
        self._tokens = self._tokens_first = 0  # in all, and those that came first
        self._began = now()
        self.seconds = 0.0
        self.seconds_to_first_token: float | None = None

    def count(self, tokens: int) -> None:
        """So many new tokens have come."""
        self.seconds = now() - self._began
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token, self._tokens_first = self.seconds, tokens
        self._tokens += tokens

    @property
    def seconds_per_token(self) -> float | None:
        """Of the tokens after those that came first; None where there are none."""
        first, after = self.seconds_to_first_token, self._tokens - self._tokens_first
        return None if first is None or not after else (self.seconds - first) / after

    def describe(self) -> list[str]:
        """The parts of the status line, most important first."""
        if self.note is not None:
            return [self.note]
        if self._model is None:
            stage, done, total = self._stage
            return _moving(_STAGES.get(stage, stage), done, total, now() - self._stage_began, self._stage_from)
        stats = self._model.lamina.stats
        if stats.passes != self._pass:
            self._pass, self._pass_began = stats.passes, now()
        elapsed = now() - self._pass_began
        if not self._tokens:
            return _moving("reading the prompt", stats.pass_bytes_done, stats.pass_bytes_expected, elapsed)
        parts = [_share(f"token {self._tokens + 1}", stats.pass_bytes_done, stats.pass_bytes_expected)]
        if stats.seconds_per_token:
            left = (self._max_new_tokens - self._tokens) * stats.seconds_per_token
            parts += [f"{stats.seconds_per_token:.2f} s/token", f"at most {format_seconds(left)} left"]
        return parts + _rate(stats.pass_bytes_done, elapsed)


def _moving(name: str, done: int, total: int, elapsed: float, before: int = 0) -> list[str]:
    parts = [_share(name, done, total)]
    if total <= 0:
        return parts
    parts.append(f"{format_size(done)} of {format_size(total)}")
    if rate := _rate(done - before, elapsed):
        parts += [*rate, f"{format_seconds(max(total - done, 0) * elapsed / (done - before))} left"]
    return parts


def _share(name: str, done: int, total: int) -> str:
    return f"{name} {min(done / total, 1):.0%}" if total > 0 else name


def _rate(done: int, elapsed: float) -> list[str]:
    return [format_rate(done / elapsed)] if done > 0 and elapsed > 0.5 else []
