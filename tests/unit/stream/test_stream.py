"""The stream over a disk in memory that answers late and out of order: every unit has its bytes, every time."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator

import pytest

from helpers.schedules import Checkpoint, Disk, llama, mixture, narrow, nested, random_schedule, streamed
from helpers.walker import Aborted, Walker, looker, watchdog
from lamina.errors import BudgetError, ClosedError, ReadError, TruncatedError
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan
from lamina.plan.schedule import Schedule
from lamina.stream.readers import Readers
from lamina.stream.stream import Stream


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


def tight(schedule: Schedule, more: int = 0) -> Plan:
    """The smallest plan there is, or one with `more` bytes."""
    try:
        return make_plan(schedule, Budget(more))
    except BudgetError as error:
        return make_plan(schedule, Budget(error.minimum_bytes + more))


class Rig:
    """A schedule, its disk, its readers and a model that walks it."""

    def __init__(self, schedule: Schedule, checkpoint: Checkpoint, plan: Plan, seed: int = 0, slow: float = 0.0,
                 threads: int = 4) -> None:  # fmt: skip
        self.disk = Disk(checkpoint, seed, slow, direct=bool(seed % 2))
        self.readers = Readers(threads, chunk=8192, opener=self.disk.open)
        self.stream = Stream(plan, self.readers)
        self.walker = Walker(schedule.root, plan, self.stream, looker(checkpoint), random.Random(seed))

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.gate.set()
        self.readers.close()


@pytest.mark.parametrize("seed", range(40))
def test_every_unit_has_its_bytes(seed: int) -> None:
    rng = random.Random(seed)
    share = rng.choice((0.0, 0.2))
    schedule, checkpoint = random_schedule(seed, share=share)
    plan = streamed(schedule, rng.choice((0, 1000, 5000, 20_000)), rng.choice((0, 0, 5000, 500_000)))
    with Rig(schedule, checkpoint, plan, seed, slow=0.0003) as rig:
        for turn in range(6):
            rig.walker.skip = 0.15 if turn in (2, 3) else 0.0
            rig.walker.abort = 0.05 if turn in (3, 4) else 0.0
            try:
                rig.walker.run()
            except Aborted:
                continue
            if turn in (0, 1, 5) and not share:
                assert not rig.walker.missed
                assert len(rig.walker.seen) == len(plan.steps)


@pytest.mark.parametrize("build", [lambda: llama(4, 64, 96, 32, 128), lambda: mixture(3, 64, 48, 4)])
@pytest.mark.parametrize("times", [0, 3])
def test_real_shapes_at_the_smallest_ring_and_at_one_larger_than_a_pass(build: object, times: int) -> None:
    schedule, checkpoint = build()  # type: ignore[operator]
    plan = tight(schedule)
    whole = sum(plan.items[i].nbytes for i in plan.steps)
    plan = dataclasses.replace(plan, ring_bytes=times * whole) if times else narrow(schedule, plan)
    with Rig(schedule, checkpoint, plan, seed=1, slow=0.0002) as rig:
        for _ in range(5):
            rig.walker.run()
            assert not rig.walker.missed


def test_the_next_pass_is_read_while_this_one_ends() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = tight(schedule)
    plan = dataclasses.replace(plan, ring_bytes=2 * plan.ring_bytes)
    with Rig(schedule, checkpoint, plan) as rig:
        rig.walker.run()
        rig.readers.settle()
        read = rig.disk.reads
        held = rig.stream.acquire(plan.items[plan.steps[0]].module)  # before any begin_pass
        assert held is not None and held.step == len(plan.steps)
        assert rig.disk.reads == read, "the first unit of the next pass was in the ring already"


def test_a_unit_behind_the_pass_is_none_and_spoils_nothing() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = tight(schedule)
    modules = [plan.items[i].module for i in plan.steps]
    with Rig(schedule, checkpoint, plan) as rig:
        rig.stream.begin_pass()
        later = rig.stream.acquire(modules[4])
        assert later is not None
        assert rig.stream.acquire(modules[1]) is None
        assert rig.stream.acquire("no such module") is None
        rig.stream.release(later)
        assert rig.stream.acquire(modules[5]) is not None


@pytest.mark.parametrize("skipped", [{3}, {0, 1, 2}, set(range(2, 11)), set(range(12))])
def test_what_a_module_holds_survives_the_skipping_of_units_inside_it(skipped: set[int]) -> None:
    schedule, checkpoint = nested()
    plan = streamed(schedule, 0)
    assert any(item.module == "layer" for item in plan.items)
    look = looker(checkpoint)
    with Rig(schedule, checkpoint, plan) as rig:
        for _ in range(3):
            rig.stream.begin_pass()
            own = rig.stream.acquire("layer")
            assert own is not None
            for i in sorted(set(range(12)) - skipped):
                held = rig.stream.acquire(f"layer.{i}")
                assert held is not None
                look(held, held.item.layout)
                rig.stream.release(held)
                rig.readers.settle()
                look(own, own.item.layout)
            rig.stream.release(own)
            last = rig.stream.acquire("after")
            assert last is not None
            look(last, last.item.layout)
            rig.stream.release(last)


def test_what_the_ring_cannot_hold_beside_what_the_model_holds_is_left_to_be_read_apart() -> None:
    """A module that is called before its turn, while its caller holds weights of its own."""
    schedule, checkpoint = nested()
    plan = streamed(schedule, 0)
    plan = dataclasses.replace(plan, ring_bytes=plan.ring_bytes - 12 * plan.items[1].nbytes)
    look = looker(checkpoint)
    with Rig(schedule, checkpoint, plan) as rig:
        for _ in range(2):
            rig.stream.begin_pass()
            own = rig.stream.acquire("layer")
            assert own is not None
            assert rig.stream.acquire("layer.11") is None
            look(own, own.item.layout)
            rig.stream.release(own)
            last = rig.stream.acquire("after")
            assert last is not None
            look(last, last.item.layout)
            rig.stream.release(last)


@pytest.mark.parametrize("at", [0, 1, 5, -1])
def test_an_aborted_pass_that_gave_nothing_back_leaves_the_next_one_whole(at: int) -> None:
    """Ctrl-C runs no hooks: what the model had is never released."""
    schedule, checkpoint = llama(2, 64, 96, 32, 128)
    plan = streamed(schedule, 0)
    modules = [(plan.items[i].module, plan.items[i].block) for i in plan.steps]
    with Rig(schedule, checkpoint, plan) as rig:
        for _ in range(4):
            rig.stream.begin_pass()
            for module, block in modules[:at]:
                held = rig.stream.acquire(module, block)
                assert held is not None
                rig.stream.release(held)
            assert rig.stream.acquire(*modules[at]) is not None
        rig.walker.run()
        assert not rig.walker.missed


def test_a_reader_s_error_reaches_the_model_as_itself_and_the_next_pass_works() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = tight(schedule)
    with Rig(schedule, checkpoint, plan) as rig:
        rig.walker.run()
        for broken in (ReadError("reading 'a' failed: Input/output error"), None):
            rig.readers.settle()
            rig.disk.broken, rig.disk.cut_at = broken, None if broken else 5000
            with pytest.raises((ReadError, TruncatedError)) as caught:
                for _ in range(3):
                    rig.walker.run()
            assert broken is None or caught.value is broken
            with pytest.raises((ReadError, TruncatedError)):
                rig.walker.run()
            rig.disk.broken = rig.disk.cut_at = None
            for _ in range(3):
                rig.walker.run()
                assert not rig.walker.missed
        rig.readers.close()
        assert all(file.closed for file in rig.disk.opened)


def test_an_error_of_a_unit_that_is_skipped_is_nobody_s() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = streamed(schedule, 0)
    modules = [plan.items[i].module for i in plan.steps]
    with Rig(schedule, checkpoint, plan) as rig:
        rig.readers.settle()
        rig.disk.broken = ReadError("broken")
        rig.stream.begin_pass()
        rig.readers.settle()
        rig.disk.broken = None
        held = rig.stream.acquire(modules[-1])
        assert held is not None
        looker(checkpoint)(held, held.item.layout)


def test_closing_wakes_the_model_that_waits() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    with Rig(schedule, checkpoint, tight(schedule)) as rig:
        rig.disk.gate.clear()
        raised: list[BaseException] = []

        def model() -> None:
            try:
                rig.walker.run()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=model)
        thread.start()
        while not rig.readers._shared.reading:
            pass
        closer = threading.Thread(target=rig.readers.close)
        closer.start()
        thread.join()
        assert [type(error) for error in raised] == [ClosedError]
        rig.disk.gate.set()
        closer.join()
        with pytest.raises(ClosedError):
            rig.walker.run()


def test_an_interrupt_anywhere_leaves_the_next_pass_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt comes between any two lines: here it comes out of each method that the stream calls."""
    schedule, checkpoint = llama(2, 64, 96, 32, 128)
    plan = streamed(schedule, 0)
    for owner, name in ((Readers, "submit"), (Readers, "wait"), (Stream, "_reclaim"), (Stream, "_give_up")):
        for after in (0, 1, 5, 9):
            with Rig(schedule, checkpoint, plan) as rig, monkeypatch.context() as patch:
                left = [after]
                plain = getattr(owner, name)

                def interrupted(*args: object, left: list[int] = left, plain: object = plain) -> object:
                    result = plain(*args)  # type: ignore[operator]
                    left[0] -= 1
                    if left[0] == -1:
                        raise KeyboardInterrupt
                    return result

                patch.setattr(owner, name, interrupted)
                try:
                    for _ in range(3):
                        rig.walker.run()
                except KeyboardInterrupt:
                    pass
                assert left[0] < 0
                for _ in range(2):
                    rig.walker.run()
                    assert not rig.walker.missed


def test_bytes_done_grows_to_the_bytes_of_a_pass() -> None:
    schedule, checkpoint = llama(3, 64, 96, 32, 128)
    plan = tight(schedule)
    with Rig(schedule, checkpoint, plan) as rig:
        for _ in range(2):
            seen: list[int] = []
            rig.walker.look = lambda held, layout, seen=seen: seen.append(rig.stream.bytes_done)
            rig.walker.run()
            assert seen == sorted(seen) and 0 < seen[0] < seen[-1] == plan.bytes_read_per_pass
