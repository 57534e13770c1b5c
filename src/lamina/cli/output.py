"""Writing to stdout and stderr: a reader that has gone is no error, a disk that is full is one."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO

from lamina.errors import WriteError


class OutputClosed(Exception):
    """The reader of the output has closed it (`lamina run ... | head -1`): the command is done."""


def ready() -> None:
    """Make the streams of this process fit to write to: there, and able to take any text.

    A stream that was closed when the process began is None; one that is not in UTF-8 has no letter for most of what a
    model says.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def write(stream: IO[str], text: str, *, now: bool = False) -> None:
    """Write a part of the result; at once where `now`.

    Raises:
        OutputClosed: its reader has closed it.
        WriteError: the system refused it.
    """
    try:
        stream.write(text)
        if now:
            stream.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error
    except OSError as error:
        raise WriteError(f"cannot write the result: {error.strerror or error}") from error


def put(text: str) -> None:
    """Write a whole result, and the end of its line, to stdout."""
    write(sys.stdout, f"{text}\n")


def tell(line: str, stream: IO[str] | None = None, *, end: str = "\n") -> None:
    """A line about progress, on stderr; an error in writing it is ignored."""
    stream = stream or sys.stderr
    with suppress(OSError):
        stream.write(f"{line}{end}")
        stream.flush()


def finish() -> None:
    """Flush the result now: at the exit an error could not be reported.

    Raises:
        OutputClosed, WriteError: as `write`.
    """
    write(sys.stdout, "", now=True)


def give_up() -> None:
    """Nothing more can be written to stdout: what is left in its buffer is dropped, also at the exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
