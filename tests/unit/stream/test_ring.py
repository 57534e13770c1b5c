"""The ring: first in, first out, no two runs overlap, none wraps."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.plan.layout import ALIGNMENT, align
from lamina.stream.ring import Ring


class Rings(RuleBasedStateMachine):
    @initialize(pages=st.integers(1, 12))
    def make(self, pages: int) -> None:
        self.nbytes = pages * ALIGNMENT
        self.ring = Ring(self.nbytes)
        self.runs: deque[tuple[int, int]] = deque()

    @rule(nbytes=st.integers(1, 6 * ALIGNMENT))
    def take(self, nbytes: int) -> None:
        size = align(nbytes)
        start = self.ring.take(nbytes)
        if start is None:
            held = sum(b - a for a, b in self.runs)
            assert self.runs or size > self.nbytes, "an empty ring takes whatever is no larger than itself"
            # what the end of the ring may waste is less than a run: the planner counts on it
            largest = max([size, *(b - a for a, b in self.runs)])
            assert held + size + largest > self.nbytes
        else:
            assert start % ALIGNMENT == 0 and start >= 0 and start + size <= self.nbytes
            self.runs.append((start, start + size))

    @precondition(lambda self: self.runs)
    @rule()
    def give_back(self) -> None:
        self.ring.give_back()
        self.runs.popleft()

    @rule()
    def clear(self) -> None:
        self.ring.clear()
        self.runs.clear()

    @invariant()
    def runs_are_disjoint(self) -> None:
        runs = sorted(getattr(self, "runs", ()))
        assert all(runs[i][1] <= runs[i + 1][0] for i in range(len(runs) - 1))


TestRings = Rings.TestCase
TestRings.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def test_an_item_of_no_bytes_does_not_stop_the_ring() -> None:
    ring = Ring(2 * ALIGNMENT)
    assert ring.take(0) is not None
    assert ring.take(ALIGNMENT) is not None
    ring.give_back()
    assert ring.take(10) is not None
