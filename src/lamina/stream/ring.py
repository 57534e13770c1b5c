"""A ring of bytes: space is taken at the front and given back at the back, in the same order."""

from __future__ import annotations

from collections import deque

from lamina.plan.layout import align


class Ring:
    """Allocates contiguous, aligned runs of a fixed number of bytes, first in, first out. No memory of its own."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._front = 0
        self._runs: deque[tuple[int, int]] = deque()  # (start, size)

    def take(self, nbytes: int) -> int | None:
        """Start of a free run of `nbytes`, or None while there is none.

        A run never wraps: what is left at the end of the ring is skipped.
        """
        size = align(max(nbytes, 1))
        if not self._runs:
            start, limit = 0, self.nbytes
        else:
            back = self._runs[0][0]
            start = self._front
            wrapped = start <= back  # the front is behind the back: only the gap between them is free
            if not wrapped and start + size > self.nbytes:
                start, wrapped = 0, True
            limit = back if wrapped else self.nbytes
        if start + size > limit:
            return None
        self._runs.append((start, size))
        self._front = start + size
        return start

    @property
    def taken(self) -> int:
        """Bytes of all runs."""
        return sum(size for _, size in self._runs)

    def give_back(self) -> None:
        """Free the oldest run."""
        self._runs.popleft()

    def clear(self) -> None:
        """Free every run."""
        self._runs.clear()
        self._front = 0
