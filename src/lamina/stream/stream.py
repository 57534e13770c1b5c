"""The stream: units arrive in the order of the pass, ahead of the model, through a ring of fixed size.

The story on one screen: `pump` takes ring space for the next step and starts its reads; `acquire` waits for
the step the model is at; `release` gives its space back and pumps again. Steps are counted without end, so
that the ring wraps from the last unit of a pass to the first of the next while the token is being sampled.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lamina.errors import ClosedError
from lamina.plan.layout import Item
from lamina.plan.plan import Plan
from lamina.stream.device import Device, Lane, Pin, Slot
from lamina.stream.direct_io import Area
from lamina.stream.observe import EAR, LAMINA, timed
from lamina.stream.readers import Readers, Ticket
from lamina.stream.ring import Ring


@dataclass(eq=False)
class Held:
    """One step's item in the ring.

    Attributes:
        step: counted from the first pass on.
        memory: uint8 of the item's layout; on the device once it was entered there.
        slot: where it is on the device, once its copy was queued.
        released: the model needs it no longer, or never will.
    """

    step: int
    item: Item
    memory: torch.Tensor
    ticket: Ticket
    slot: Slot | None = None
    released: bool = False


CACHED_AHEAD = 64  # items looked ahead where host memory already holds them


def _wholes(parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The memories that host copies of items are parts of, each once."""
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]


class _Order:
    """The order in which a part of the model needs items: that of every pass, or that of a branch.

    Attributes:
        steps: indices of the plan's items.
        places: by module and block, where they are among the steps.
        bytes_before: by place, what is read before it.
    """

    def __init__(self, plan: Plan, steps: tuple[int, ...]) -> None:
        self.steps = steps
        read = (0 if plan.items[i].cached else plan.items[i].layout.read_bytes for i in steps)
        self.bytes_before = list(itertools.accumulate(read, initial=0))
        self.places: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, index in enumerate(steps):
            self.places[plan.items[index].module, plan.items[index].block].append(place)

    def __len__(self) -> int:
        return len(self.steps)


class Stream:
    """Executes a plan: the one consumer is the thread that runs the model.

    Args:
        plan: what to stream, in which order, through how large a ring.
        readers: fill the ring; not shared.
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
        self._pins: list[Pin | None] = []
        if device is not None:
            self._pins = [device.pin(memory) for memory in (self._area.tensor, *_wholes(self._cached.values()))]
            self._lane = Lane(device, plan.device_ring_bytes)
        self._ahead: deque[Held] = deque()  # read or being read, the model is not there yet
        self._out: dict[int, Held] = {}  # by step: the model has it
        self._filled: deque[Held] = deque()  # all that have bytes of the ring, oldest first
        self._unsent: deque[Held] = deque()  # to be copied to the device, oldest first
        self._broken = False  # an error or an interrupt left something half done
        self._generation = readers.generation
        self._next = 0  # the step to read next
        self._cursor = 0  # the step the model needs next
        self._pass = 0  # the first step of this pass
        self._end = 0  # of a branch: the step after the last one of the turn through it that the model is in
        self._orders = [_Order(plan, steps) for steps in (plan.steps, *plan.branches)]
        self._order = self._orders[0]

    @property
    def closed(self) -> bool:
        """Whether its readers are closed."""
        return self.readers.closed

    @property
    def in_branch(self) -> bool:
        """Whether the model went through a branch last, and not through what every pass does."""
        return self._order is not self._orders[0]

    @property
    def bytes_done(self) -> int:
        """Bytes read for this pass that the model has already consumed or is waiting for no more."""
        return self._order.bytes_before[min(self._cursor - self._pass, len(self._order))]

    def begin_pass(self) -> None:
        """The model starts at its first unit; what an aborted pass left is given back."""
        if any(held.ticket.error is not None for held in self._ahead):
            self._broken = True  # an old error: the file may be whole again
        self._recover()
        self._broken = True
        for held in self._out.values():
            self._give_up(held)
        self._out.clear()
        self._turn_to(self._orders[0])
        self._pass = self._end_of_pass(self._cursor)
        self._skip_to(self._pass)
        self._pump()
        self._broken = False

    def rewind(self) -> None:
        """Forget everything that was read ahead; the next step is the first of a pass."""
        self._broken = True
        self.readers.settle()
        if self._lane is not None:
            self._lane.clear()
        self._ring.clear()
        self._out.clear()
        for queue in (self._ahead, self._filled, self._unsent):
            queue.clear()
        self._pass = self._cursor = self._next = self._end_of_pass(max(self._cursor, self._next))
        self._generation = self.readers.generation
        self._broken = False

    def close(self) -> None:
        """Copies are waited for, and host memory is given back to the driver. Not needed before it is collected."""
        if self._lane is not None:
            self._lane.device.settle()
            self._lane.device.computed().wait()
        for pin in self._pins:
            if pin is not None:
                pin.release()

    @property
    def window(self) -> Area:
        """The ring's memory; free for other use after `rewind`, until the next pass."""
        return self._area

    def forget(self) -> None:
        """In a forked child, where nothing is under way: begin again."""
        self.rewind()

    @timed(LAMINA)
    def acquire(self, module: str, block: int = 0) -> Held | None:
        """The item that `module` needs now, read; None where it has to be read apart from the stream.

        That is where the pass is already past it, or where the model holds so much, out of the order of the
        plan, that the ring has no room for it.

        Raises:
            ReadError, TruncatedError: what a reader thread met.
            ClosedError: the stream was closed.
        """
        self._recover()
        self._look_for(module, block)
        step = self._find(module, block)
        if step is None:
            return None
        self._broken = True
        self._skip_to(step)
        self._end = self._end_of_pass(step + 1)
        began = time.perf_counter()
        held = self._arrived(step)
        self.seconds_waiting += time.perf_counter() - began
        self._cursor = step + 1
        if held is not None:
            self._ahead.popleft()
            if self._lane is not None and not self._enter(held, self._lane):
                self._give_up(held)
                held = None
            else:
                self._out[step] = held
        self._next = max(self._next, self._cursor)
        self._broken = False
        return held

    @timed(LAMINA)
    def release(self, held: Held) -> None:
        """The model is done with an item (on a device: has queued its last use)."""
        broken, self._broken = self._broken, True
        self._out.pop(held.step, None)
        self._give_up(held)
        if not broken:  # after an error nothing is read before the next pass
            self._pump()
            self._broken = False

    def pump(self) -> None:
        """Give back what is free, start reading what fits."""
        self._recover()
        self._broken = True
        self._pump()
        self._broken = False

    @timed(LAMINA)
    def _pump(self) -> None:
        self._reclaim()
        while not self.closed and self._wanted():
            index = self._order.steps[self._next % len(self._order)]
            item = self.plan.items[index]
            if index in self._cached:
                if self._next - self._cursor > CACHED_AHEAD:
                    break
                held = Held(self._next, item, self._cached[index], Ticket())
            else:
                start = self._ring.take(item.nbytes)
                self._tell(full=start is None)
                if start is None:
                    break
                ticket = self.readers.submit(item.layout.reads, self._area, start)
                held = Held(self._next, item, self._area.tensor[start : start + item.nbytes], ticket)
                self._filled.append(held)
            self._ahead.append(held)
            if self._lane is not None:
                self._unsent.append(held)
            self._next += 1
        if self._lane is not None:
            self._upload(self._lane)

    def _wanted(self) -> bool:
        """Whether the next step will be needed: those of the order that all passes have, of another till its end."""
        if not len(self._order):
            return False
        return not self.in_branch or self._next < self._end

    def _look_for(self, module: str, block: int) -> None:
        """Turn to the order that has this block, if it is another; not while the model holds what it has of this one.

        Nothing of a branch is read before the model goes through it, and what was read ahead of it is read again.
        """
        if (module, block) in self._order.places or self._out:
            return
        for order in self._orders:
            if (module, block) in order.places:
                return self._turn_to(order)

    def _turn_to(self, order: _Order) -> None:
        if order is not self._order:
            self.rewind()
            self._order = order
            self._pass = self._cursor = self._next = self._end = 0

    def _tell(self, full: bool = False) -> None:
        """Report to the listener how full the ring is."""
        if EAR.listener is not None:
            EAR.listener.ring(self._ring.taken, full)

    def _find(self, module: str, block: int) -> int | None:
        """The step, at or after the cursor and in the same pass, that serves this block of `module`."""
        places = self._order.places.get((module, block))
        if not places:
            return None
        place = self._cursor % len(self._order)
        index = bisect.bisect_left(places, place)
        return None if index == len(places) else self._cursor - place + places[index]

    def _end_of_pass(self, step: int) -> int:
        return -(-step // len(self._order)) * len(self._order) if len(self._order) else step

    def _recover(self) -> None:
        if self._broken or self._generation != self.readers.generation:
            self.rewind()

    def _skip_to(self, step: int) -> None:
        """The model passes over the steps before `step`; what it has already stays with it."""
        while self._ahead and self._ahead[0].step < step:
            self._give_up(self._ahead.popleft())
        self._cursor = step
        self._next = max(self._next, step)

    def _give_up(self, held: Held) -> None:
        held.released = True
        if self._lane is not None and held.slot is not None and not held.slot.released:
            self._lane.leave(held.slot)

    def _arrived(self, step: int) -> Held | None:
        """Wait until the item of `step` is in the ring and read; None where it will never be."""
        while True:
            if not self._ahead or self._lane is not None:  # without a device every release has pumped already
                self._pump()
            if self._ahead:
                held = self._ahead[0]
                self.readers.wait(held.ticket)
                return held
            if self.closed:
                raise ClosedError("the stream is closed: load the model again")
            oldest = self._filled[0] if self._filled else None
            if oldest is not None and not oldest.ticket.done:
                self.readers.settled(oldest.ticket)
            elif oldest is not None and oldest.slot is not None:
                oldest.slot.copied.wait()
            else:
                return None

    def _reclaim(self) -> None:
        """Free the oldest runs: no read under way into them, copied to the device or, without one, consumed."""
        while self._filled:
            oldest = self._filled[0]
            free = oldest.released if oldest.slot is None else oldest.slot.copied.done()
            if not free or not oldest.ticket.done:
                return
            self._filled.popleft()
            self._ring.give_back()
            self._tell()

    def _upload(self, lane: Lane) -> None:
        """Queue copies of what has been read, in order, as far as the device has slots."""
        while self._unsent:
            held = self._unsent[0]
            if not held.released:
                if not held.ticket.done or held.ticket.error is not None:
                    return
                held.slot = lane.upload(held.memory)
                if held.slot is None:
                    return
            self._unsent.popleft()

    def _enter(self, held: Held, lane: Lane) -> bool:
        """Have the item on the device for what is computed from now on; False where there is no room."""
        if held.slot is None:
            self._upload(lane)
        if held.slot is None:
            return False
        held.memory = lane.enter(held.slot)
        return True
