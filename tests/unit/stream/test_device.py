"""Copies to a device, against one that does everything as late and in as bad an order as it may."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from helpers.fake_device import FakeDevice
from helpers.schedules import Checkpoint, Disk, llama, mixture, nested, random_schedule, streamed
from helpers.walker import Aborted, Walker, watchdog
from lamina.errors import ReadError
from lamina.plan.layout import Layout
from lamina.plan.plan import Plan
from lamina.plan.schedule import Schedule
from lamina.stream.device import Lane
from lamina.stream.readers import Readers
from lamina.stream.stream import Held, Stream

SEEDS = range(60)
MANNERS = [(0.0, "copy"), (0.0, "compute"), (0.0, ""), (0.3, "copy"), (0.3, "compute"), (0.3, ""), (0.9, "")]


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


def late_looker(device: FakeDevice, disk: Checkpoint) -> object:
    """Queues, as a computation, the comparison of what lies in the slot with what the disk holds."""

    def look(held: Held, layout: Layout) -> None:
        memory, step = held.memory, held.step
        wanted = [(placed, disk.stored(placed.part)) for placed in layout.placed]

        def compare() -> str | None:
            for placed, want in wanted:
                if bytes(memory[placed.stored_at : placed.stored_at + placed.stored_nbytes].numpy()) != want:
                    return f"step {step}: {placed.part}"
            return None

        device.compute(compare)

    return look


def cached_items(plan: Plan, checkpoint: Checkpoint, share: float, rng: random.Random) -> dict[int, torch.Tensor]:
    """Host copies of some items, made without the stream."""
    cached = {}
    for index, item in enumerate(plan.items):
        if rng.random() < share:
            memory = torch.zeros(item.nbytes, dtype=torch.uint8)
            for placed in item.layout.placed:
                stored = torch.frombuffer(bytearray(checkpoint.stored(placed.part)), dtype=torch.uint8)
                memory[placed.stored_at : placed.stored_at + placed.stored_nbytes] = stored
            cached[index] = memory
    return cached


def go(schedule: Schedule, checkpoint: Checkpoint, plan: Plan, device: FakeDevice, seed: int, *, passes: int = 4,
       cached: float = 0.0, rough: bool = False) -> list[str]:  # fmt: skip
    """Passes over a device; what its computations saw that was wrong."""
    rng = random.Random(seed)
    disk = Disk(checkpoint, seed, slow=0.0001 if seed % 4 == 0 else 0.0)
    readers = Readers(3, chunk=8192, opener=disk.open)
    try:
        stream = Stream(plan, readers, device, cached_items(plan, checkpoint, cached, rng))
        walker = Walker(schedule.root, plan, stream, late_looker(device, checkpoint), rng)  # type: ignore[arg-type]
        for turn in range(passes):
            walker.skip = 0.15 if rough and turn % 2 else 0.0
            walker.abort = 0.04 if rough and turn % 2 else 0.0
            disk.broken = ReadError("broken") if rough and turn == 3 else None
            try:
                walker.run()
            except (Aborted, ReadError):
                pass
            else:
                if not walker.skip and not rough:
                    assert not walker.missed
            readers.settle()
        device.finish()
    finally:
        readers.close()
    return device.failures


def scene(seed: int) -> tuple[Schedule, Checkpoint, Plan]:
    rng = random.Random(seed)
    build = rng.choice(("random", "random", "llama", "mixture", "nested"))
    if build == "random":
        schedule, checkpoint = random_schedule(seed, share=0.0)
    elif build == "nested":
        schedule, checkpoint = nested()
    else:
        schedule, checkpoint = llama(3, 64, 96, 32, 128) if build == "llama" else mixture(2, 64, 48, 4)
    return schedule, checkpoint, streamed(schedule, rng.choice((0, 0, 5000, 20_000)), rng.choice((0, 0, 9000, 200_000)))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_computation_sees_wrong_bytes(seed: int) -> None:
    device = FakeDevice(seed, *MANNERS[seed % len(MANNERS)])
    assert go(*scene(seed), device, seed, cached=random.Random(seed).choice((0.0, 0.5, 1.0))) == []


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_no_computation_sees_wrong_bytes_in_rough_passes(seed: int) -> None:
    device = FakeDevice(seed, *MANNERS[seed % len(MANNERS)])
    assert go(*scene(seed), device, seed, cached=0.3, rough=True, passes=8) == []


def never(self: Stream) -> None:
    """A `_reclaim` that does not wait for the copy out of the ring."""
    while self._filled:
        oldest = self._filled[0]
        if not (oldest.released or oldest.slot is not None) or not oldest.ticket.done:
            return
        self._filled.popleft()
        self._ring.give_back()


def early(self: Lane, slot: object) -> None:
    """A `leave` that takes the event of the slot that was left first for the last use."""
    slot.used = self.device.computed()  # type: ignore[attr-defined]
    slot.released = True  # type: ignore[attr-defined]
    while self._slots and self._slots[0].released:
        self._last_used = self._slots.popleft().used  # type: ignore[attr-defined]
        self._ring.give_back()


@pytest.mark.parametrize("wait", ["copy after use", "use after copy", "read after copy", "last use"])
def test_each_wait_is_needed(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it some interleaving gives a computation wrong bytes: the tests above can fail."""
    if wait == "copy after use":
        plain = FakeDevice.copy
        monkeypatch.setattr(FakeDevice, "copy", lambda self, target, source, after: plain(self, target, source, None))
    elif wait == "use after copy":
        monkeypatch.setattr(FakeDevice, "compute_after", lambda self, event: None)
    elif wait == "read after copy":
        monkeypatch.setattr(Stream, "_reclaim", never)
    else:
        monkeypatch.setattr(Lane, "leave", early)
    for seed in SEEDS:
        if go(*scene(seed), FakeDevice(seed, *MANNERS[seed % len(MANNERS)]), seed):
            return
    raise AssertionError(f"nobody noticed that {wait!r} is gone")


def test_a_slow_link_neither_spins_nor_starves() -> None:
    """Nothing is done on the device before somebody waits, and the ring is the smallest: every pass still ends."""
    for favourite in ("copy", "compute"):
        schedule, checkpoint = llama(3, 64, 96, 32, 128)
        assert go(schedule, checkpoint, streamed(schedule, 0), FakeDevice(0, 0.0, favourite), 1, passes=3) == []


def test_many_cached_items_inside_a_module_that_holds_its_own() -> None:
    schedule, checkpoint = nested(150)
    device = FakeDevice(0, 0.1)
    assert go(schedule, checkpoint, streamed(schedule, 0), device, 1, cached=1.0) == []


def test_slots_are_given_back_in_order_and_fill_no_more_than_the_lane() -> None:
    device = FakeDevice(0, 0.0)
    lane = Lane(device, 3 * 4096)
    source = torch.arange(4096, dtype=torch.int32).to(torch.uint8)
    slots = [lane.upload(source) for _ in range(3)]
    assert all(slots) and lane.upload(source) is None
    first, second, third = (slot for slot in slots if slot is not None)
    lane.leave(second)
    assert lane.upload(source) is None, "the oldest is still in use"
    lane.leave(first)
    again = lane.upload(source)
    assert again is not None and again.at == 0
    assert torch.equal(lane.enter(third), lane.tensor[third.at : third.at + third.nbytes])
    lane.clear()
    assert all(lane.upload(source) for _ in range(3))
    device.finish()
