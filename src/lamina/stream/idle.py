"""How much a drive could read while the model computes and asks it for nothing."""

from __future__ import annotations

NEW = 0.1  # part of a new measurement in the moving averages
NOTICED = 50e-6  # seconds: a shorter wait is none


class Idle:
    """Measures, from call to call, the time in which nothing is asked of the drive, and the rate at which it delivers.

    Times are seconds of one clock.
    """

    def __init__(self) -> None:
        self._seconds = self._rate = 0.0
        self._place = -1
        self._asked = 0
        self._began = self._done = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that fit into the time between the last expert of one call and the router of the next."""
        return int(self._seconds * self._rate)

    def call(self, now: float, place: int) -> None:
        """A call begins; `place` is its module's in the order of a pass."""
        if self._place >= 0:
            if self._asked and self._done > self._began:
                self._rate = _mixed(self._rate, self._asked / (self._done - self._began))
            if place > self._place:  # between two passes a token is chosen: that is another matter
                self._seconds = _mixed(self._seconds, now - self._done)
        self._place, self._asked, self._began, self._done = place, 0, now, now

    def asked(self, nbytes: int) -> None:
        """So much was asked of the drive for this call."""
        self._asked += nbytes

    def waited(self, began: float, now: float) -> None:
        """The model stood still for something that was asked."""
        if now - began > NOTICED:
            self._done = now


def _mixed(average: float, value: float) -> float:
    return value if not average else (1 - NEW) * average + NEW * value
