"""Experts on demand: read when the router has chosen, kept as far as the cache goes.

The story on one screen: `route` gets the experts that a call of a module will use and starts reading all that are
missing, as far as there are slots; `acquire` waits for the next of them, moves the window on, so that experts
that were passed make room for those still to come; `leave` ends the call. `prefetch` gets the experts that a later
call will probably use: they are read while nothing else is, and taken back if the router says otherwise. On an
accelerator a second cache holds experts on the device, above the one in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.plan.expert_slots import Experts
from lamina.plan.layout import Layout
from lamina.stream.device import Device, Event, Pin
from lamina.stream.direct_io import Area
from lamina.stream.expert_cache import ExpertCache, Idle, Key
from lamina.stream.observe import COPY, LAMINA, timed
from lamina.stream.readers import Readers, Ticket


@dataclass(eq=False)
class Expert:
    """One expert in a slot.

    Attributes:
        layout: what lies where in `memory`.
        memory: uint8 of the layout's bytes, where the model computes.
        tensors: what the model made of them; written here at the first use.
    """

    layout: Layout
    memory: torch.Tensor
    ticket: Ticket | None = None  # of its reads; None while it is on the device only
    copied: Event | None = None  # to the device, or from this memory to the device
    used: Event | None = None  # the last computation with it is queued before this
    tensors: Any = None


@dataclass
class Counts:
    """What the cache did so far.

    Attributes:
        calls: of modules that said where their tokens go.
        routed: experts that calls asked for, each once a call.
        hits: of these, how many were there already.
        prefetched: how many were on their way, or there, only because they were prefetched.
        nbytes: read from disk for the others.
        tokens: routed to each expert, by module.
    """

    calls: int = 0
    routed: int = 0
    hits: int = 0
    prefetched: int = 0
    nbytes: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def misses(self) -> int:
        """How many of the experts asked for had to be read then."""
        return self.routed - self.hits - self.prefetched


class ExpertStream:
    """Gives experts to the one thread that runs the model.

    Args:
        experts: the modules, in the order of a pass.
        slots: how many experts the memory holds, in `slot_bytes` each.
        readers: who reads; urgent, before what streams.
        device: None where the processor computes.
        device_slots: how many experts the device holds.
        idle: says how much may be prefetched.
    """

    def __init__(
        self,
        experts: Sequence[Experts],
        slots: int,
        slot_bytes: int,
        readers: Readers,
        device: Device | None = None,
        device_slots: int = 0,
        idle: Idle | None = None,
    ) -> None:
        self.experts, self.readers, self.device = experts, readers, device
        self.on_read: Callable[[Layout], None] | None = None  # called with every expert that is read
        self.counts = Counts(tokens={module.module: [0] * module.count for module in experts})
        self.seconds_waiting = 0.0
        self._number = {module.module: number for number, module in enumerate(experts)}
        self._layouts: dict[Key, Layout] = {}
        sizes = [module.count for module in experts]
        self._cache = ExpertCache(slots, sizes)
        self._areas: dict[int, Area] = {slot: Area(slot_bytes) for slot in range(slots)}
        self._kept: dict[Key, Expert] = {}
        self._above = ExpertCache(device_slots, sizes)  # on the device
        self._places: dict[int, torch.Tensor] = {}
        self._pins: dict[int, Pin | None] = {}
        self._free_after: dict[int, Event] = {}  # device slots: when what used them before is computed
        self._on_device: dict[Key, Expert] = {}
        if device is not None:
            self._pins = {slot: device.pin(area.tensor) for slot, area in self._areas.items()}
            self._places = {slot: device.memory(slot_bytes) for slot in range(device_slots)}
            self._free_after = dict.fromkeys(self._places, device.computed())
        self._busy_until: dict[int, Event] = {}  # host slots: when they are copied
        self._module = ""
        self._queue: list[Key] = []  # of the call under way, in the order of use
        self._wanted: dict[Key, int] = {}  # from the one in use on, with its place in the queue
        self._next = 0  # place in the queue of the next one to start reading
        self._prefetched: dict[Key, Ticket] = {}  # read for a call that is still to come
        self._idle = idle or Idle()
        self._broken = False
        self._generation = readers.generation

    @timed(LAMINA)
    def route(self, module: str, tokens: Mapping[int, int], total: int) -> None:
        """A call of `module` begins, with `total` tokens that go to the experts in `tokens`, each with its count."""
        number = self._number[module]
        with self._whole():
            self._leave()
            self._idle.call(time.perf_counter(), number)
            self._begin(module, sorted(tokens))
            self.counts.calls += 1
            counted = self.counts.tokens[module]
            for expert, count in tokens.items():
                counted[expert] += count
            self._cache.saw(number, tokens, total)
            self._above.saw(number, tokens, total)
            self._pump()

    def routed(self, module: str) -> bool:
        """Whether a call of `module` is under way whose routing is known."""
        return self._module == module

    @timed(LAMINA)
    def acquire(self, module: str, expert: int) -> Expert:
        """The expert, ready to be computed with until the next one is asked for.

        Raises:
            ReadError, TruncatedError: what a reader thread met.
            ClosedError: the stream was closed.
        """
        key = (self._number[module], expert)
        with self._whole():
            if key in self._queue and key not in self._wanted:
                self._go_back(key)
            elif key not in self._wanted:
                self._leave()
                self._begin(module, [expert])
            self._move_on(key)
            self._pump()
            began = time.perf_counter()
            found = self._arrived(key)
            now = time.perf_counter()
            self.seconds_waiting += now - began
            self._idle.waited(began, now)
            self._upload_ahead()
        return found

    @property
    def prefetches(self) -> bool:
        """Whether it pays to prefetch: while the cache still fills, the drive is what is waited for."""
        return self._cache.full and self._cache.slots > 1

    @timed(LAMINA)
    def prefetch(self, module: str, experts: Iterable[int]) -> None:
        """A call that is still to come will probably use `experts`, the likeliest first.

        Only as many are read as the drive has time for while the model computes: more would take its time, and
        their slots, from experts that are certain.
        """
        number = self._number[module]
        with self._whole():
            time_for = self._idle.nbytes
            for expert in experts:
                key = (number, expert)
                if key in self._cache or key in self._above:
                    continue
                size = self._layout(key).read_bytes
                if time_for < size / 2 or len(self._prefetched) + len(self._wanted) >= self._cache.slots // 2:
                    return
                time_for -= size
                if not self._start(key, urgent=False):
                    return
                ticket = self._kept[key].ticket
                assert ticket is not None
                self._prefetched[key] = ticket

    @timed(LAMINA)
    def leave(self) -> None:
        """The call is over, however it ended."""
        with self._whole():
            self._leave()

    def shrink(self, slots: int, device_slots: int = 0) -> None:
        """Have at most this many slots from now on; the experts that are worth least go."""
        with self._whole():
            self._leave()
            self._resolve(set())
            for key, ticket in list(self._prefetched.items()):
                self.readers.settled(ticket)
                self._forget(key)
            self._prefetched.clear()
            for slot in self._cache.shrink(slots):
                self._wait_for_copy(slot)
                self._unpin(slot)
                del self._areas[slot]
            for expert in self._on_device.values():
                if expert.copied is not None:
                    expert.copied.wait()  # what is given up is another's memory at once
            for slot in self._above.shrink(device_slots):
                self._free_after.pop(slot, None)
                del self._places[slot]
            self._kept = {key: expert for key, expert in self._kept.items() if key in self._cache}
            self._on_device = {key: expert for key, expert in self._on_device.items() if key in self._above}

    def close(self) -> None:
        """Copies are waited for, and the slots are given back to the driver; nothing is copied any more."""
        if self.device is not None:
            self.device.settle()
            self.device.computed().wait()
        for slot in list(self._pins):
            self._unpin(slot)

    def _unpin(self, slot: int) -> None:
        pin = self._pins.pop(slot, None)
        if pin is not None:
            pin.release()

    @property
    def slots(self) -> int:
        """How many experts fit in host memory."""
        return self._cache.slots

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is done inside is done as a whole, or put right before anything else is done."""
        if self._broken or self._generation != self.readers.generation:
            self._broken = True
            self._put_right()
        self._broken = True
        yield
        self._broken = False

    def _put_right(self) -> None:
        """After an interrupt or in a forked child: keep what is known to be read whole, forget the rest."""
        self.readers.settle()
        self._end()
        self._prefetched.clear()
        self._cache.mend(self._areas)
        self._above.mend(self._places)
        self._kept = {key: kept for key, kept in self._kept.items() if key in self._cache}
        self._on_device = {key: expert for key, expert in self._on_device.items() if key in self._above}
        for key in self._cache.held():
            if not self._is_read(key):
                self._forget(key)
        for key in self._above.held():
            if key not in self._on_device:
                self._above.drop(key)
        if self.device is not None and self._places:
            self._order_anew(self.device)
        self._generation = self.readers.generation

    def _is_read(self, key: Key) -> bool:
        kept = self._kept.get(key)
        return kept is not None and kept.ticket is not None and _read(kept.ticket)

    def _order_anew(self, device: Device) -> None:
        """After an interrupt the last uses of the device's slots may not have been written down, nor a copy."""
        computed = device.computed()
        self._free_after = dict.fromkeys(self._places, computed)
        for expert in self._on_device.values():
            expert.used = computed
        device.settle()

    def _resolve(self, wanted: Collection[Key]) -> set[Key]:
        """Hurry those that were prefetched rightly, take the others back; which ones were right."""
        right = set()
        for key, ticket in list(self._prefetched.items()):
            if key in wanted and not ticket.cancelled and ticket.error is None:
                self.readers.hurry(ticket)
                right.add(key)
            else:
                self.counts.nbytes -= self.readers.cancel(ticket)
                if key in wanted:
                    self.readers.settled(ticket)
                if not ticket.done:
                    continue
                if not _read(ticket):
                    self._forget(key)
            del self._prefetched[key]
        return right

    def _begin(self, module: str, experts: Iterable[int]) -> None:
        number = self._number[module]
        self._module, self._next = module, 0
        self._queue = [(number, expert) for expert in experts]
        self._wanted = {key: place for place, key in enumerate(self._queue)}
        prefetched = self._resolve(self._wanted.keys())
        there = {key for key in self._queue if key in self._cache or key in self._above}
        self.counts.routed += len(self._queue)
        self.counts.prefetched += len(there & prefetched)
        self.counts.hits += len(there - prefetched)

    def _leave(self) -> None:
        """Nothing is in use and nothing under way."""
        for key in self._wanted:
            self._pass_by(key)
        self._end()

    def _end(self) -> None:
        self._module, self._queue, self._wanted, self._next = "", [], {}, 0

    def _move_on(self, key: Key) -> None:
        """Those before `key` in the queue were used, or never will be."""
        place = self._wanted[key]
        for passed in list(self._wanted):
            if self._wanted[passed] >= place:
                break
            self._pass_by(passed)
            del self._wanted[passed]
        self._next = max(self._next, place)

    def _pass_by(self, key: Key) -> None:
        """An expert was used, or never will be; if it was not asked for, it may be under way or have failed."""
        self._used(key)
        kept = self._kept.get(key)
        if kept is not None and kept.ticket is not None:
            self.readers.settled(kept.ticket)  # its slot may be wanted
            if not _read(kept.ticket):
                self._forget(key)

    def _go_back(self, key: Key) -> None:
        """The call asks again for an expert that it had passed."""
        for later in self._wanted:
            self._used(later)
        self._next = self._queue.index(key)
        self._wanted = {later: place for place, later in enumerate(self._queue) if place >= self._next}

    def _pump(self) -> None:
        """Start reading what the call still needs, as far as there are slots."""
        while self._next < len(self._queue):
            key = self._queue[self._next]
            if key not in self._above and not self._start(key):
                return
            self._next += 1

    def _start(self, key: Key, *, urgent: bool = True) -> bool:
        """Have an expert in memory or on its way there; False where every slot is in use."""
        if key in self._cache:
            return True
        if self.device is not None and len(self._cache) == self._cache.slots:
            self._prefer_copies()
        keep = {*self._wanted, *self._prefetched} if self._prefetched else self._wanted.keys()
        taken = self._cache.take(key, keep)
        if taken is None:
            return False
        slot, gone = taken
        if gone is not None:
            self._kept.pop(gone, None)
        self._wait_for_copy(slot)
        layout = self._layout(key)
        area = self._areas[slot]
        ticket = self.readers.submit(layout.reads, area, urgent=urgent)
        self._kept[key] = Expert(layout, area.tensor[: layout.nbytes], ticket)
        self.counts.nbytes += layout.read_bytes
        if urgent:
            self._idle.asked(layout.read_bytes)
        if self.on_read is not None:
            self.on_read(layout)
        return True

    def _arrived(self, key: Key) -> Expert:
        """The expert on the computing device; where no slot is free, the expert needed last gives up its slot."""
        if self.device is not None and key in self._above:
            return self._entered(key)
        while not self._start(key):
            last = max((k for k in self._wanted if k in self._cache), key=self._wanted.__getitem__)
            self._next = min(self._next, self._wanted[last])
            kept = self._kept[last]
            assert kept.ticket is not None
            self.readers.settled(kept.ticket)
            self._forget(last)
        kept = self._kept[key]
        assert kept.ticket is not None
        try:
            self.readers.wait(kept.ticket)
        except BaseException:
            if kept.ticket.done:
                self._forget(key)
            raise
        if self.device is None:
            return kept
        self._upload(key, {key})
        return self._entered(key)

    def _forget(self, key: Key) -> None:
        self._cache.drop(key)
        self._kept.pop(key, None)

    def _layout(self, key: Key) -> Layout:
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = self.experts[key[0]].layout(key[1])
        return found

    # The device's tier

    def _prefer_copies(self) -> None:
        """Where the memory is full, an expert that is on the device as well goes first: the one that stays there."""
        double = [key for key in self._on_device if key in self._cache and key not in self._wanted]
        if double:
            self._forget(max(double, key=self._cache.worth))

    def _upload_ahead(self) -> None:
        """Copy what has been read of the call and fits beside what it still uses."""
        if self.device is None:
            return
        for key in self._wanted:
            kept = self._kept.get(key)
            if key in self._above or kept is None or kept.ticket is None:
                continue
            if not kept.ticket.done or kept.ticket.error is not None or not self._upload(key, self._wanted.keys()):
                return

    @timed(COPY)
    def _upload(self, key: Key, keep: Collection[Key]) -> bool:
        """Queue the copy of an expert to the device; False where every slot there is in use."""
        assert self.device is not None
        taken = self._above.take(key, keep)
        if taken is None:
            return False
        slot, gone = taken
        if gone is not None:
            old = self._on_device.pop(gone, None)
            if old is not None and old.used is not None:
                self._free_after[slot] = old.used
        kept = self._kept[key]
        target = self._places[slot][: kept.layout.nbytes]
        copied = self.device.copy(target, kept.memory, self._free_after.get(slot))
        self._on_device[key] = Expert(kept.layout, target, copied=copied)
        source = self._cache.slot(key)
        assert source is not None
        self._busy_until[source] = copied
        return True

    @timed(COPY)
    def _entered(self, key: Key) -> Expert:
        """An expert on the device, for computations queued from now on."""
        assert self.device is not None
        found = self._on_device[key]
        assert found.copied is not None
        self.device.compute_after(found.copied)
        return found

    def _used(self, key: Key) -> None:
        """Every computation with an expert has been queued."""
        if self.device is not None and key in self._on_device:
            self._on_device[key].used = self.device.computed()

    @timed(COPY)
    def _wait_for_copy(self, slot: int) -> None:
        event = self._busy_until.pop(slot, None)
        if event is not None:
            event.wait()


def _read(ticket: Ticket) -> bool:
    """Whether all of it came."""
    return ticket.done and ticket.error is None and not ticket.cancelled
