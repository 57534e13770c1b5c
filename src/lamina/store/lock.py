"""One process at a time writes a store: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from lamina.atomic_files import refusals

LOCK = ".lamina.lock"
_PAUSE_S = 0.2


@contextlib.contextmanager
def locked(folder: str, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the folder's lock; `waiting` is called again and again while another process has it. Gives whether it holds.

    The lock is the kernel's (`flock`), not the file: one that a killed process left behind is free. Where there is
    no `flock` nothing is locked; two processes then write the same bytes under names of their own, and the last
    rename wins.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    path = os.path.join(folder, LOCK)
    while True:
        with refusals(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while (taken := _take(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
                waiting()
                time.sleep(_PAUSE_S)
            if not _is_current(fd, path):
                continue  # the process before removed the file that this lock is on
            try:
                yield taken
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return
        finally:
            os.close(fd)


def _take(flock: Callable[[int, int], None], fd: int, how: int) -> bool | None:
    """True: it is ours; None: another process has it; False: this file system knows no such locks."""
    try:
        flock(fd, how)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _is_current(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
