"""What the user of a chat says next: a line, a block between two `\"""`, or all that was pasted at once.

On a terminal that marks what is pasted, readline gives it as one text. Text that comes in one burst without those marks
is put together here: what is already there when a line has ended was not typed after it was read.
"""

from __future__ import annotations

import importlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from lamina.cli import interrupt, output
from lamina.cli.generation import text_of

PROMPT, GOING_ON = "> ", ". "
BLOCK = '"""'
BURST_S = 0.03  # a terminal hands on a paste in pieces, with less than this between them
NUDGE_S, NUDGES = 0.05, 20
LEAVING = ("/bye", "/exit", "/quit", "bye", "exit", "quit")
_COMMAND = re.compile(r"/[a-z]+\s*|/(image|audio)\s.*", re.IGNORECASE)


def leaves(message: str) -> bool:
    """Whether it ends the chat."""
    return message.lower() in LEAVING


class Messages:
    """Reads messages: `next` gives one, or None at the end of the input."""

    def __init__(self) -> None:
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        self._waiting: list[str] = []  # lines of a burst that are messages of their own
        self._begun = False  # something of the message is there
        self._readline: Any = None
        if self._terminal:
            with suppress(ImportError):
                readline = self._readline = importlib.import_module("readline")  # editing and history for input()
                readline.parse_and_bind("set enable-bracketed-paste on")  # which Python switches off
                if os.environ.get("NO_COLOR"):
                    readline.parse_and_bind("set enable-active-region off")  # what was pasted, in other colours

    def next(self) -> str | None:
        """The next message, without the white space around it; empty where nothing was said.

        Ctrl-C takes back what is typed so far.

        Raises:
            RequestError: what a pipe gives is not text.
            KeyboardInterrupt: Ctrl-C where nothing is typed.
        """
        while True:
            self._begun = False
            try:
                with interrupt.Apart(self._interrupted), _heard() if self._terminal else nullcontext():
                    message = self._message()
                return None if message is None else message.strip()
            except KeyboardInterrupt:
                self._waiting.clear()
                output.tell("")
                if not self._begun:
                    raise

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        self._begun = self._begun or bool(self._readline is not None and self._readline.get_line_buffer())
        raise KeyboardInterrupt

    def _message(self) -> str | None:
        line = self._line(PROMPT)
        if line is None:
            return None
        self._begun = True
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        return self._burst(line)

    def _block(self, begun: str) -> str:
        """All up to the closing quotes; up to the end of the input where there are none."""
        lines = [begun]
        while BLOCK not in lines[-1]:
            line = self._line(GOING_ON)
            if line is None:
                break
            lines.append(line)
        lines[-1] = lines[-1].replace(BLOCK, "", 1)
        return "\n".join(lines)

    def _burst(self, line: str) -> str:
        """The line, and the others that came with it. A command is a message of its own, in a burst as well."""
        lines = [line]
        while self._terminal and not _COMMAND.fullmatch(lines[-1]) and self._more():
            following = self._line("")
            if following is None:
                break
            lines.append(following)
        if len(lines) > 1 and (_COMMAND.fullmatch(lines[-1]) or leaves(lines[-1].strip())):
            self._waiting.append(lines.pop())
        return "\n".join(lines)

    def _more(self) -> bool:
        """Whether more was pasted."""
        if self._waiting:
            return True
        with suppress(OSError, ValueError):  # some systems cannot ask a terminal
            return bool(select.select([sys.stdin], [], [], BURST_S)[0])
        return False

    def _line(self, prompt: str) -> str | None:
        if self._waiting:
            return self._waiting.pop(0)
        if self._terminal and sys.stdout.isatty():
            return _typed(lambda: input(prompt))
        if self._terminal:  # progress does not belong to the text, which is written elsewhere
            output.tell(prompt, end="")
        raw = getattr(sys.stdin, "buffer", sys.stdin).readline() if sys.stdin is not None else ""
        return text_of(raw, "a line on standard input").rstrip("\r\n") if raw else None


@contextmanager
def _heard() -> Iterator[None]:
    """While the block runs, Ctrl-C is not left for the next key.

    CPython asks for signals where its wait for a key is interrupted. One that came a moment before that wait begins
    would be seen at the next key: the wait is interrupted again, by a change of the window's size that is none.
    """
    if not hasattr(signal, "SIGWINCH"):
        yield
        return
    waiting, ended = threading.get_ident(), threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def nudge() -> None:
        while os.read(read, 1) and not ended.is_set():
            for _ in range(NUDGES):
                if ended.wait(NUDGE_S):
                    return
                signal.pthread_kill(waiting, signal.SIGWINCH)

    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    nudging = threading.Thread(target=nudge, name="lamina-keys", daemon=True)
    nudging.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(write)  # which ends the thread's wait
        nudging.join()
        os.close(read)


def _typed(read: Callable[[], str]) -> str | None:
    try:
        return text_of(read(), "what was typed")
    except EOFError:
        output.tell("")
        return None
