"""The stream: units arrive in the order of the pass, ahead of the model, through a ring of fixed size.

The story on one screen: `pump` takes ring space for the next step and starts its reads; `acquire` waits for
the step the model is at; `release` gives its space back and pumps again. Steps are counted without end, so
that the ring wraps from the last unit of a pass to the first of the next while the token is being sampled.
"""

from __future__ import annotations

import bisect
import time
from collections import defaultdict, deque
from dataclasses import dataclass

import torch

from lamina.errors import ClosedError
from lamina.plan.planner import Item, Plan
from lamina.stream.device import Device, Lane, Slot
from lamina.stream.memory import Area
from lamina.stream.readers import Readers, Ticket
from lamina.stream.ring import Ring


@dataclass(eq=False)
class Held:
    """One step's item in the ring.

    Attributes:
        step: counted from the first pass on.
        memory: uint8 of the item's layout; on the device once it was entered there.
    """

    step: int
    item: Item
    memory: torch.Tensor
    ticket: Ticket
    slot: Slot | None = None
    released: bool = False
    in_ring: bool = True


CACHED_AHEAD = 64  # items looked ahead where host memory already holds them


class Stream:
    """Executes a plan: the one consumer is the thread that runs the model.

    Args:
        plan: what to stream, in which order, through how large a ring.
        readers: fill the ring; shared with nobody else.
        device: None where the processor computes.
        cached: host copies of items that only cross to the device, by item index.
    """

    def __init__(
        self, plan: Plan, readers: Readers, device: Device | None = None, cached: dict[int, torch.Tensor] | None = None
    ) -> None:
        self.plan, self.readers = plan, readers
        self.seconds_waiting = 0.0
        self._area = Area(plan.ring_bytes)
        self._ring = Ring(self._area.nbytes)
        self._cached = cached or {}
        self._lane = None
        if device is not None:
            device.pin(self._area.tensor)
            self._lane = Lane(device, plan.device_ring_bytes)
        self._ahead: deque[Held] = deque()  # in the ring, oldest first
        self._next = 0  # the step to read next
        self._cursor = 0  # the step the model needs next
        self._places: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, index in enumerate(plan.steps):
            self._places[plan.items[index].module, plan.items[index].block].append(place)

    @property
    def closed(self) -> bool:
        return self.readers.closed

    @property
    def bytes_done(self) -> int:
        """Bytes of this pass that the model has already consumed or is waiting for no more."""
        place = self._cursor % len(self.plan.steps)
        return sum(self.plan.items[i].layout.read_bytes for i in self.plan.steps[:place])

    def begin_pass(self) -> None:
        """The model starts at its first unit; what an aborted pass left is skipped."""
        steps = len(self.plan.steps)
        if self._cursor % steps:
            self._skip_to(self._cursor + steps - self._cursor % steps)
        self.pump()

    def rewind(self) -> None:
        """Forget everything that was read ahead: after an error or in a forked child."""
        for held in self._ahead:
            with self.readers.changed:
                while held.ticket.left and not self.readers.closed:
                    self.readers.changed.wait()
            if self._lane is not None and held.slot is not None and not held.slot.released:
                self._lane.drop(held.slot)
        self._ahead.clear()
        self._ring.clear()
        steps = len(self.plan.steps)
        self._cursor = self._next = -(-max(self._cursor, self._next) // steps) * steps

    def forget(self) -> None:
        """In a forked child nothing is under way: begin again without waiting for anything."""
        self._ahead.clear()
        self._ring.clear()
        steps = len(self.plan.steps)
        self._cursor = self._next = -(-max(self._cursor, self._next) // steps) * steps

    def acquire(self, module: str, block: int = 0) -> Held | None:
        """The item that `module` needs now, read; None where the pass is already past it.

        Raises:
            ReadError, TruncatedError: what a reader thread met.
            ClosedError: the stream was closed.
        """
        step = self._find(module, block)
        if step is None:
            return None
        if step > self._cursor:
            self._skip_to(step)
        began = time.perf_counter()
        held = self._arrived(step)
        self.seconds_waiting += time.perf_counter() - began
        self._cursor = step + 1
        if self._lane is not None:
            self._enter(held)
        return held

    def release(self, held: Held) -> None:
        """The model is done with an item (on a device: has queued its last use)."""
        held.released = True
        if self._lane is not None and held.slot is not None:
            self._lane.leave(held.slot)
        self.pump()

    def pump(self) -> None:
        """Give back what is free, start reading what fits."""
        self._reclaim()
        self._next = max(self._next, self._cursor)
        while not self.closed:
            index = self.plan.steps[self._next % len(self.plan.steps)]
            item = self.plan.items[index]
            if index in self._cached:
                if len(self._ahead) > CACHED_AHEAD:
                    break
                held = Held(self._next, item, self._cached[index], Ticket(), in_ring=False)
            else:
                start = self._ring.take(item.nbytes)
                if start is None:
                    break
                ticket = self.readers.submit(item.layout.reads, self._area, start)
                held = Held(self._next, item, self._area.tensor[start : start + item.nbytes], ticket)
            self._ahead.append(held)
            self._next += 1
        if self._lane is not None:
            self._upload()

    def _find(self, module: str, block: int) -> int | None:
        """The step, at or after the cursor and in the same pass, that serves this block of `module`."""
        places = self._places.get((module, block))
        if not places:
            return None
        place = self._cursor % len(self.plan.steps)
        index = bisect.bisect_left(places, place)
        return None if index == len(places) else self._cursor - place + places[index]

    def _skip_to(self, step: int) -> None:
        for held in self._ahead:
            if held.step < step:
                held.released = True
                if self._lane is not None and held.slot is not None and not held.slot.released:
                    self._lane.drop(held.slot)
        self._cursor = step
        self.pump()

    def _arrived(self, step: int) -> Held:
        """Wait until the item of `step` is in the ring and read."""
        while True:
            self.pump()
            held = next((h for h in self._ahead if h.step == step), None)
            if held is not None:
                self._wait(held)
                return held
            if self.closed:
                raise ClosedError("the stream is closed: load the model again")
            oldest = self._ahead[0]
            if not oldest.released:
                raise AssertionError(f"the ring is too small for step {step}: {self.plan.ring_bytes} bytes")
            self.readers.wait(oldest.ticket)

    def _wait(self, held: Held) -> None:
        try:
            self.readers.wait(held.ticket)
        except ClosedError:
            raise
        except BaseException:
            self.rewind()
            raise

    def _reclaim(self) -> None:
        """Free the oldest runs: consumed, no read under way into them, no copy under way out of them."""
        while self._ahead:
            oldest = self._ahead[0]
            if not oldest.released or not oldest.ticket.done:
                return
            if oldest.slot is not None and not oldest.slot.copied.done():
                if self._ring_has_room():
                    return
                oldest.slot.copied.wait()
            self._ahead.popleft()
            if oldest.in_ring:
                self._ring.give_back()

    def _ring_has_room(self) -> bool:
        return any(not held.released for held in self._ahead)

    def _upload(self) -> None:
        """Queue copies of what has been read, in order, as far as the device has slots."""
        assert self._lane is not None
        for held in self._ahead:
            if held.slot is None and not held.released:
                if not held.ticket.done or held.ticket.error is not None:
                    return
                held.slot = self._lane.upload(held.memory)
                if held.slot is None:
                    return

    def _enter(self, held: Held) -> None:
        assert self._lane is not None
        if held.slot is None:
            self._upload()
        if held.slot is None:
            raise AssertionError(f"the device ring is too small: {self.plan.device_ring_bytes} bytes")
        held.memory = self._lane.enter(held.slot)
