"""Ctrl-C is one line and exit code 130, whenever it comes.

While modules are imported there is nothing to tidy up, and an exception raised in the middle of that may come out as
any other: the process leaves at once. While a command is at work it is a `KeyboardInterrupt`, which what is at work
tidies up after; the second one leaves at once. In a process that did not begin as the program `lamina` nothing is
touched, nor where Ctrl-C is ignored, as in what a shell runs in the background.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # nothing is imported here that takes time: see `lamina.__main__`
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

    Handler = Callable[[int, FrameType | None], None]

CODE = 130
LINE = b"lamina: interrupted\n"

pressed = False
before_leaving: Callable[[], None] | None = None  # takes the status line away


def leave(signum: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """Say the line and end the process at once."""
    if before_leaving is not None:
        before_leaving()
    try:
        os.write(2, LINE)
    finally:
        os._exit(CODE)


def take(signum: int, frame: FrameType | None) -> None:
    """The first Ctrl-C stops what is at work; the second is not patient."""
    global pressed
    if pressed:
        leave()
    pressed = True
    raise KeyboardInterrupt


def begin() -> None:
    """Called first by the program: from then on, Ctrl-C is looked after."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
        sys.unraisablehook = _lost


def leave_at_once() -> None:
    """From here on nothing needs tidying up."""
    if _ours():
        signal.signal(signal.SIGINT, leave)


def raise_first() -> None:
    """From here on a command is at work."""
    if _ours():
        signal.signal(signal.SIGINT, take)


class Apart:
    """While the block runs, Ctrl-C is what `handler` makes of it; it does not count as the first one."""

    def __init__(self, handler: Handler = signal.default_int_handler) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _ours() -> bool:
    return signal.getsignal(signal.SIGINT) in (leave, take)


def _lost(unraisable: sys.UnraisableHookArgs) -> None:
    """A Ctrl-C that came while something was being deleted would be printed there, and be forgotten."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraisable)
