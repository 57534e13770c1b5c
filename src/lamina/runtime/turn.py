"""One thread at a time runs a model; a forked child never waits for a thread that it does not have.

`os.fork` copies memory and locks, but of the threads only the one that forked. A child that was forked between two
passes, or by the thread that is in one, has all that it needs. One that was forked while another thread was in a pass
has a pass that nobody will end, and weights bound for it: the model is of no use there, and says so.
"""

from __future__ import annotations

import os
import threading
import weakref

from lamina.errors import UnsupportedError


class Turn:
    """A lock that a thread may take again while it has it.

    Raises, when it is entered:
        UnsupportedError: in a child that was forked while another thread had it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._lost = False
        _watch_forks(self)

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise what `__enter__` raises, without waiting."""
        if self._lost:
            raise UnsupportedError(
                "this process was forked while another thread ran the model, so that half a pass is all it has of it: "
                "load the model in the child, or start processes by multiprocessing's 'spawn'"
            )

    def after_fork(self) -> None:
        """In a child, before anything else runs there: whose turn is it?"""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lost = True


_living: weakref.WeakSet[Turn] = weakref.WeakSet()
_forks_watched = False


def _watch_forks(turn: Turn) -> None:
    global _forks_watched
    _living.add(turn)
    if not _forks_watched and hasattr(os, "register_at_fork"):
        _forks_watched = True
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for turn in list(_living):
        turn.after_fork()
