"""The points at which a listener is called: in the stream, the runtime, packed weights. Without one they cost a test.

A point is a method in `timed`: the listener is called when the method has ended, after an error too. There is one
listener at a time, for all models of the process; it is called in the thread that called the method.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

WAIT, COPY, UNPACK = "wait", "copy", "unpack"  # what a point is: a wait for the disk, work on bytes
THROUGH = "through"  # code that calls torch to compute: only what is no operation of torch within is its own
LAMINA = "lamina"  # anything else

P = ParamSpec("P")
R = TypeVar("R")


class Listener(Protocol):
    """Receives the calls of all points; times are nanoseconds of `time.perf_counter_ns`."""

    def span(self, kind: str, name: str, begin: int, end: int) -> None:
        """A call has ended; its name says what was done, and to which module, weight or unit."""

    def ring(self, taken: int, full: bool) -> None:
        """So many bytes of the stream's ring are taken now; `full` where the next unit has no room."""


class _Ear:
    listener: Listener | None = None


EAR = _Ear()


def listen(listener: Listener) -> Callable[[], None]:
    """Install `listener`.

    Returns:
        A function that puts the listener before it back.
    """
    before, EAR.listener = EAR.listener, listener

    def end() -> None:
        EAR.listener = before

    return end


def timed(kind: str, name: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method as a point.

    Args:
        kind: `WAIT`, `COPY`, `UNPACK`, `THROUGH` or `LAMINA`.
        name: passed to the listener; by default that of the method, with what it is called for.
    """

    def point(call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def observed(*args: P.args, **kwargs: P.kwargs) -> R:
            listener = EAR.listener
            if listener is None:
                return call(*args, **kwargs)
            began = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                ended = time.perf_counter_ns()
                listener.span(kind, name or _label(call.__name__.strip("_"), args[1:]), began, ended)

        return observed

    return point


def _label(name: str, args: tuple[Any, ...]) -> str:
    """What is done, and to what: a module, a weight, a unit."""
    of = args[0] if args else ""
    for attribute in ("part", "item"):
        of = getattr(of, attribute, of)
    of = getattr(of, "weight", getattr(of, "module", of))
    return f"{name} {of}" if isinstance(of, str) and of else name
