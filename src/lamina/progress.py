"""How long work reports what is done: one callback for everything that takes its time."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage (`download`, `wait`, `check`, `split`, `verify`, `load`), bytes done and bytes in all.

Calls may come from other threads than the caller's, one call at a time.
"""


class Tally:
    """Adds up the bytes of one stage, from any thread, and reports each piece.

    Attributes:
        done: bytes so far.
    """

    def __init__(self, progress: Progress | None, stage: str, total: int, done: int = 0) -> None:
        self.done = done
        self._progress, self._stage, self._total = progress, stage, total
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        with self._lock:
            self.done += nbytes
            if self._progress is not None:
                self._progress(self._stage, min(self.done, self._total), self._total)

    def reach(self, done: int) -> None:
        """So many are done in all."""
        self.add(done - self.done)
