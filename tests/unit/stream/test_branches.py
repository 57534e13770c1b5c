"""A branch of the model, such as a vision tower, is read when the model goes through it, and at no other time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from helpers.schedules import Checkpoint, Disk, towered
from helpers.walker import Aborted, Walker, looker, watchdog
from lamina.plan.plan import Budget, Plan
from lamina.plan.planner import make_plan, minimum_memory
from lamina.plan.schedule import Call, Schedule
from lamina.stream.readers import Readers
from lamina.stream.stream import Held, Stream


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


class Rig:
    """A schedule with a tower, its disk, and a model that goes through either; what is in file `stays` is resident."""

    def __init__(self, more: int = 0, seed: int = 0, stays: str = "", **shape: int) -> None:
        self.schedule, self.checkpoint = towered(**shape)
        weights = self.schedule.weights.values()
        keep = frozenset(w.name for w in weights if w.pieces[0].extent.file == stays) if stays else None
        self.plan = planned(self.schedule, more, keep)
        self.disk = Disk(self.checkpoint, seed)
        self.readers = Readers(4, chunk=8192, opener=self.disk.open)
        self.stream = Stream(self.plan, self.readers)
        self.look = looker(self.checkpoint)
        self.tower = self.schedule.branches[0]
        self.walker = walker(self.schedule.root, self.plan, self.stream, self.checkpoint, seed)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.readers.close()

    def files(self) -> set[str]:
        """Files that were read of; none is being read afterwards."""
        self.readers.settle()
        return {file.path for file in self.disk.opened}

    def main(self) -> list[tuple[str, int]]:
        """Modules and blocks of the main order."""
        return [(self.plan.items[i].module, self.plan.items[i].block) for i in self.plan.steps]

    def side(self) -> list[tuple[str, int]]:
        """Those of the tower."""
        return [(self.plan.items[i].module, self.plan.items[i].block) for i in self.plan.branches[0]]

    def take(self, module: str, block: int = 0) -> Held:
        held = self.stream.acquire(module, block)
        assert held is not None
        assert (held.item.module, held.item.block) == (module, block)
        self.look(held, held.item.layout)
        return held

    def through(self, *places: tuple[str, int]) -> None:
        """Take and give back one after another."""
        for module, block in places:
            self.stream.release(self.take(module, block))


def planned(schedule: Schedule, more: int, keep: frozenset[str] | None) -> Plan:
    least, _ = minimum_memory(schedule, Budget(1))
    return make_plan(schedule, Budget(least + more), keep=keep)


def walker(root: Call, plan: Plan, stream: Stream, checkpoint: Checkpoint, seed: int = 0) -> Walker:
    return Walker(root, plan, stream, looker(checkpoint), random.Random(seed))


@pytest.mark.parametrize("more", [0, 30_000])
def test_a_pass_over_text_reads_nothing_of_a_branch(more: int) -> None:
    with Rig(more) as rig:
        for _ in range(3):
            rig.walker.run()
            assert not rig.walker.missed
        assert rig.files() == {"a"}


@pytest.mark.parametrize("more", [0, 30_000])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_every_unit_of_a_branch_comes_through_the_stream(more: int, before: int) -> None:
    with Rig(more) as rig:
        rig.stream.begin_pass()
        rig.through(*rig.main()[:before])
        assert rig.files() <= {"a"}
        rig.through(*rig.side())
        assert "tower" in rig.files()
        rig.through(*rig.main()[before:])
        rig.walker.run()
        assert not rig.walker.missed
        assert len(rig.walker.seen) == len(rig.plan.steps)


@pytest.mark.parametrize("more", [0, 30_000])
def test_a_branch_is_gone_through_twice_in_a_row(more: int) -> None:
    with Rig(more) as rig:
        rig.stream.begin_pass()
        rig.through(*rig.side(), *rig.side(), *rig.main())


def test_after_a_branch_nothing_more_of_it_is_read() -> None:
    with Rig(10_000) as rig:
        rig.stream.begin_pass()
        rig.through(*rig.side())
        rig.readers.settle()
        reads = rig.disk.reads
        rig.stream.pump()
        rig.readers.settle()
        assert rig.disk.reads == reads
        assert rig.stream.bytes_done == sum(rig.plan.items[i].layout.read_bytes for i in rig.plan.branches[0])


def test_units_of_a_branch_are_read_ahead() -> None:
    with Rig(10_000) as rig:
        rig.stream.begin_pass()
        held = rig.take(*rig.side()[0])
        rig.stream.release(held)
        rig.readers.settle()
        rig.disk.broken = OSError("nobody reads any more")
        rig.through(rig.side()[1])


def test_a_branch_is_refused_while_the_main_order_is_held() -> None:
    with Rig() as rig:
        rig.stream.begin_pass()
        held = rig.take(*rig.main()[0])
        assert rig.stream.acquire(*rig.side()[0]) is None
        assert rig.files() == {"a"}
        rig.stream.release(held)
        rig.through(*rig.side(), *rig.main()[1:])


def test_the_main_order_is_refused_while_a_branch_is_held() -> None:
    with Rig() as rig:
        rig.stream.begin_pass()
        assert not rig.stream.in_branch
        held = rig.take(*rig.side()[0])
        assert rig.stream.in_branch
        assert rig.stream.acquire(*rig.main()[0]) is None
        rig.stream.release(held)
        rig.through(*rig.side()[1:], *rig.main())


def test_what_is_in_no_order_is_refused() -> None:
    with Rig() as rig:
        rig.stream.begin_pass()
        assert rig.stream.acquire("nobody") is None
        rig.through(*rig.main())


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_pass_after_one_that_ended_inside_a_branch_starts_at_the_main_order(held: bool, steps: int) -> None:
    with Rig() as rig:
        rig.stream.begin_pass()
        rig.through(*rig.main()[:2], *rig.side()[:steps])
        if held:
            rig.take(*rig.side()[steps])
        rig.walker.run()
        assert not rig.walker.missed
        assert rig.walker.seen == rig.main()


def test_a_model_that_fits_but_for_its_branch() -> None:
    with Rig(10**9, stays="a") as rig:
        assert not rig.plan.steps and rig.plan.branches
        rig.walker.run()
        assert not rig.walker.seen and not rig.files()
        for _ in range(2):
            rig.stream.begin_pass()
            rig.through(*rig.side())
            assert rig.files() == {"tower"}


@pytest.mark.parametrize("seed", range(12))
def test_any_walk_through_both(seed: int) -> None:
    rng = random.Random(seed)
    more = rng.choice((0, 5000, 60_000))
    with Rig(more, seed, layers=rng.randint(1, 3), blocks=rng.randint(1, 4), width=rng.choice((8, 48, 100))) as rig:
        tower = walker(rig.tower, rig.plan, rig.stream, rig.checkpoint, seed)
        for _ in range(12):
            rig.walker.abort = tower.abort = rng.choice((0.0, 0.1))
            try:
                rig.stream.begin_pass()
                for _ in range(rng.randint(0, 2)):
                    tower.missed.clear()
                    tower._call(rig.tower)
                    assert not tower.missed
                rig.walker.missed.clear()
                rig.walker._call(rig.schedule.root)
                assert not rig.walker.missed
            except Aborted:
                continue
