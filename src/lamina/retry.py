"""Reads that are tried again: a drive or network that hiccups is no failure."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from lamina.errors import ReadError

T = TypeVar("T")
PAUSES = (0.01, 0.05, 0.25)  # seconds before a read is tried again: a drive or network that hiccups
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in "EAGAIN EINTR EIO EBUSY ETIMEDOUT ENOBUFS ENOMEM EREMOTEIO ESTALE ECONNRESET".split()
    if hasattr(errno, name)
)


def is_transient(error: BaseException) -> bool:
    """Whether what the operating system refused may succeed if it is asked again."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in _TRANSIENT


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives; where it is refused for a moment it is tried again.

    Raises:
        OSError, ReadError: it is refused for longer.
    """
    for pause in PAUSES:
        try:
            return read()
        except (OSError, ReadError) as error:
            if not is_transient(error):
                raise
        time.sleep(pause)
    return read()
