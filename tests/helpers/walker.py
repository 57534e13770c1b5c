"""A model for the stream: walks the calls of a schedule as the engine's hooks do, and looks at every byte it gets."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from helpers.schedules import Checkpoint
from lamina.plan.layout import Layout
from lamina.plan.plan import Plan
from lamina.plan.schedule import Call
from lamina.stream.stream import Held, Stream


@contextmanager
def watchdog(seconds: float = 60.0) -> Iterator[None]:
    """A deadlock ends the test run with every thread's stack instead of hanging it."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Aborted(Exception):
    """The model raised in the middle of a pass."""


Look = Callable[[Held, Layout], None]


class Walker:
    """One model over one stream.

    Args:
        look: told of every unit when it was bound, and again right before it is released.
        skip: share of calls that a pass leaves out.
        abort: chance, per call, that the pass ends with an exception.
    """

    def __init__(self, root: Call, plan: Plan, stream: Stream, look: Look, rng: random.Random) -> None:
        self.root, self.plan, self.stream, self.look, self.rng = root, plan, stream, look, rng
        self.skip = self.abort = 0.0
        self.seen: list[tuple[str, int]] = []
        self.missed: list[str] = []
        self.blocks: dict[str, int] = {}
        for item in plan.items:
            self.blocks[item.module] = max(self.blocks.get(item.module, 0), item.block)

    def run(self) -> None:
        """A pass."""
        self.seen.clear()
        self.missed.clear()
        self.stream.begin_pass()
        self._call(self.root)

    def _call(self, call: Call) -> None:
        if self.rng.random() < self.skip:
            return
        if self.rng.random() < self.abort:
            raise Aborted
        last = self.blocks.get(call.module)
        bound = self._take(call.module, 0) if last == 0 else None
        try:
            for block in range(last + 1 if last else 0):
                held = self._take(call.module, block)
                if held is not None:
                    self._give(held)
            for inner in call.calls:
                self._call(inner)
        finally:
            if bound is not None:
                self._give(bound)

    def _take(self, module: str, block: int) -> Held | None:
        held = self.stream.acquire(module, block)
        if held is None:
            self.missed.append(module)
            return None
        assert (held.item.module, held.item.block) == (module, block)
        self.seen.append((module, block))
        self.look(held, held.item.layout)
        return held

    def _give(self, held: Held) -> None:
        self.look(held, held.item.layout)
        self.stream.release(held)


def looker(disk: Checkpoint) -> Look:
    """Compares what lies in the ring with what the disk holds."""

    def look(held: Held, layout: Layout) -> None:
        for placed in layout.placed:
            stored = held.memory[placed.stored_at : placed.stored_at + placed.stored_nbytes]
            assert bytes(stored.numpy()) == disk.stored(placed.part), f"step {held.step}: {placed.part}"

    return look


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
