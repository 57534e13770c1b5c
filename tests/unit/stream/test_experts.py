"""Experts on demand over a disk in memory that answers late: whoever is asked for has its own bytes, every time."""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from helpers.fake_device import FakeDevice
from helpers.schedules import Checkpoint, Disk
from helpers.walker import watchdog
from lamina.errors import ClosedError, ReadError, TruncatedError
from lamina.plan.expert_slots import Experts, slot_bytes
from lamina.plan.layout import Layout, Part
from lamina.plan.schedule import Cut
from lamina.stream import expert_cache as cache_module
from lamina.stream import experts as stream_module
from lamina.stream import readers as readers_module
from lamina.stream.device import Event
from lamina.stream.expert_cache import Idle
from lamina.stream.experts import Expert, ExpertStream
from lamina.stream.readers import Readers

SEEDS = range(40)
MANNERS = [(0.0, "copy"), (0.0, "compute"), (0.0, ""), (0.3, "copy"), (0.3, "compute"), (0.3, ""), (0.9, "")]


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


def scene(seed: int) -> tuple[list[Experts], Checkpoint]:
    """Modules with few and many experts, of one weight or more, merged, cast, at odd offsets, in two files."""
    rng = random.Random(seed)
    checkpoint, modules = Checkpoint(seed), []
    large = seed % 8 == 7  # runs of which only the edges are copied
    for number in range(rng.randint(1, 4)):
        count, names = rng.choice((1, 2, 4, 8)), []
        for i in range(rng.randint(1, 3)):
            held = count if i == 0 else rng.choice((count, count, rng.randint(1, count)))
            itemsize = rng.choice((2, 4))
            names.append(checkpoint.add(
                f"m{number}.w{i}", held * 2, rng.choice((1, 60, 700)) if not large else 40_000, file=rng.choice("aab"),
                gap=rng.choice((0, 6, 5000)), itemsize=itemsize, stored=rng.choice((itemsize, itemsize, 6 - itemsize)),
                pieces=rng.choice((1, 1, 3, 2 * held)), odd=rng.random() < 0.2, cut=Cut.EXPERTS, experts=held,
            ))  # fmt: skip
        weights = tuple(checkpoint.weights[name] for name in names)
        modules.append(Experts(f"m{number}", weights, count, rng.randint(1, count)))
    return modules, checkpoint


def alike(modules: int = 2, count: int = 6, elements: int = 700) -> tuple[list[Experts], Checkpoint]:
    """Modules of one weight, all of a size."""
    checkpoint = Checkpoint()
    names = [checkpoint.add(f"m{i}.w", count, elements, cut=Cut.EXPERTS) for i in range(modules)]
    return [Experts(f"m{i}", (checkpoint.weights[name],), count, 1) for i, name in enumerate(names)], checkpoint


class LongIdle(Idle):
    """A model that computes so long that anything may be prefetched."""

    @property
    def nbytes(self) -> int:
        return 1 << 40


class Rig:
    """Experts, their disk, the stream, and a model that looks at every byte it gets.

    Attributes:
        reads: the layouts of experts whose reading was started.
    """

    def __init__(self, modules: list[Experts], checkpoint: Checkpoint, slots: int, seed: int = 1, slow: float = 0.0,
                 device: FakeDevice | None = None, device_slots: int = 0) -> None:  # fmt: skip
        self.modules, self.checkpoint, self.device = modules, checkpoint, device
        self.rng = random.Random(seed)
        self.disk = Disk(checkpoint, seed, slow, direct=bool(seed % 2))
        self.readers = Readers(3, chunk=8192, opener=self.disk.open)
        self.stream = ExpertStream(modules, slots, slot_bytes(modules), self.readers, device, device_slots, LongIdle())
        self.reads: list[Layout] = []
        self.stream.on_read = self.reads.append
        self.wanted: dict[tuple[str, int], dict[Part, bytes]] = {}
        self.held: tuple[Expert, dict[Part, bytes]] | None = None

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.gate.set()
        self.readers.close()

    def bytes_of(self, module: Experts, expert: int) -> dict[Part, bytes]:
        """What an expert must be, found the slow way."""
        key = module.module, expert
        if key not in self.wanted:
            rows = [(w, w.rows // w.experts) for w in module.weights if expert < w.experts]
            parts = [Part(weight.name, expert * count, count) for weight, count in rows]
            self.wanted[key] = {part: self.checkpoint.stored(part) for part in parts}
        return self.wanted[key]

    def get(self, module: Experts, expert: int) -> Expert:
        """Acquire, compare; and until then the one before has stayed what it was."""
        if self.held is not None and self.device is None:
            if self.rng.random() < 0.5:
                self.readers.settle()
            assert differing(*self.held) is None
        found = self.stream.acquire(module.module, expert)
        wanted = self.bytes_of(module, expert)
        assert [placed.part for placed in found.layout.placed] == list(wanted)
        if self.device is None:
            assert differing(found, wanted) is None
        else:
            self.device.compute(lambda: differing(found, wanted))
            if self.rng.random() < 0.3:
                self.readers.settle()
        self.held = found, wanted
        return found

    def route(self, module: Experts, *experts: int) -> None:
        self.held = None
        self.stream.route(module.module, dict.fromkeys(experts, 1), max(len(experts), 1))

    def call(self, module: Experts, *experts: int) -> None:
        """As a model's own code does it."""
        self.route(module, *experts)
        for expert in sorted(experts):
            self.get(module, expert)
        self.leave()

    def leave(self) -> None:
        self.held = None
        self.stream.leave()

    def any_call(self, *, rough: bool) -> int:
        """A call with random experts; a rough one keeps to nothing that it announced. How many it announced."""
        rng, module = self.rng, self.rng.choice(self.modules)
        union = rng.sample(range(module.count), rng.randint(1, module.count))
        if rng.random() < 0.4:  # what is named may be wrong, of another module, or come too late
            later = rng.choice((module, module, *self.modules))
            self.stream.prefetch(later.module, rng.sample(range(later.count), rng.randint(1, later.count)))
        asked = sorted(union)
        if rough and rng.random() < 0.15:
            self.held = None  # unannounced
        else:
            tokens = {expert: rng.randint(1, 5) for expert in union}
            self.held = None
            self.stream.route(module.module, tokens, sum(tokens.values()))
        if rough:
            kind = rng.choice(("as said", "some", "shuffled", "twice", "others", "elsewhere"))
            if kind == "some":
                asked = [expert for expert in asked if rng.random() < 0.4]
            elif kind == "shuffled":
                rng.shuffle(asked)
            elif kind == "twice":
                asked = asked + asked
            elif kind == "others":
                asked = [rng.randrange(module.count) for _ in range(6)]
            elif kind == "elsewhere":
                other = rng.choice(self.modules)
                self.get(other, rng.randrange(other.count))
        for expert in asked:
            for _ in range(rng.choice((1, 1, 2))):
                self.get(module, expert)
        if not rough or rng.random() < 0.7:
            self.leave()
        return len(union)

    def is_whole(self) -> None:
        """Every expert has its bytes, and as many as there are slots are kept."""
        self.leave()
        stream = self.stream
        assert stream._kept.keys() == set(stream._cache.held())
        assert stream._on_device.keys() == set(stream._above.held())
        for module in self.modules:
            self.call(module, *range(module.count))
        first, slots = self.modules[0], self.stream.slots
        assert first.count >= slots, "a scene for this question"
        self.call(first, *range(slots))
        before = len(self.reads)
        self.call(first, *range(slots))
        assert len(self.reads) == before, "a slot was lost"
        assert len(self.stream._above) == self.stream._above.slots, "a slot of the device was lost"


def differing(found: Expert, wanted: dict[Part, bytes]) -> str | None:
    """The part, if any, whose bytes are others."""
    for placed, want in zip(found.layout.placed, wanted.values(), strict=True):
        if bytes(found.memory[placed.stored_at : placed.stored_at + placed.stored_nbytes].numpy()) != want:
            return str(placed.part)
    return None


def slots_of(modules: list[Experts], rng: random.Random) -> int:
    total = sum(module.count for module in modules)
    return rng.choice((1, 1, 2, 3, rng.randint(1, total), total))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_expert_has_its_bytes(seed: int) -> None:
    modules, checkpoint = scene(seed)
    with Rig(modules, checkpoint, slots_of(modules, random.Random(seed)), seed, slow=0.0003) as rig:
        for turn in range(25):
            rig.any_call(rough=turn % 3 == 1)
        rig.readers.settle()
        assert rig.stream.counts.nbytes == rig.readers.bytes_read <= sum(layout.read_bytes for layout in rig.reads)


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 12])
def test_counts(slots: int) -> None:
    modules, checkpoint = alike(2, 6)
    with Rig(modules, checkpoint, slots) as rig:
        counts, rng, routed = rig.stream.counts, random.Random(slots), 0
        tokens = {module.module: [0] * module.count for module in modules}
        for turn in range(40):
            before = len(rig.reads), counts.misses
            module = modules[turn % 2]
            union = rng.sample(range(6), rng.randint(1, 5))
            told = {expert: rng.randint(1, 4) for expert in union}
            rig.stream.route(module.module, told, 9)
            assert rig.stream.routed(module.module) and not rig.stream.routed(modules[(turn + 1) % 2].module)
            for expert in sorted(union):
                rig.get(module, expert)
                tokens[module.module][expert] += told[expert]
            rig.leave()
            assert not rig.stream.routed(module.module)
            routed += len(union)
            read, missed = len(rig.reads) - before[0], counts.misses - before[1]
            assert read == missed or (read > missed and len(union) > slots)
        rig.readers.settle()
        assert (counts.calls, counts.routed, counts.tokens) == (40, routed, tokens)
        assert counts.hits + counts.misses == routed
        assert counts.nbytes == sum(layout.read_bytes for layout in rig.reads) == rig.readers.bytes_read
        if slots == 12:
            assert counts.misses == len(rig.reads) == 12
        if slots == 1:
            assert counts.hits < 12


@pytest.mark.parametrize("seed", range(12))
def test_a_cold_cache_reads_the_routed_experts_and_nothing_else(seed: int) -> None:
    modules, checkpoint = scene(seed)
    for slots in (1, 2, sum(module.count for module in modules)):
        with Rig(modules, checkpoint, slots, seed) as rig:
            exact = routed = 0
            for module in modules:
                union = rig.rng.sample(range(module.count), rig.rng.randint(1, module.count))
                rig.call(module, *union)
                exact += sum(module.layout(expert).read_bytes for expert in union)
                routed += len(union)
            rig.readers.settle()
            assert rig.readers.bytes_read == rig.stream.counts.nbytes == exact
            assert rig.stream.counts.misses == rig.stream.counts.routed == routed == len(rig.reads)


def test_all_that_fits_is_read_at_once_and_what_is_passed_makes_room() -> None:
    (module,), checkpoint = alike(1, 6)
    with Rig([module], checkpoint, 4) as rig:
        rig.route(module, *range(6))
        assert len(rig.reads) == 4, "as far as there are slots, before anybody asks"
        for expert, read in enumerate((4, 5, 6, 6, 6, 6)):
            rig.get(module, expert)
            assert len(rig.reads) == read
        assert [layout.placed[0].part.first for layout in rig.reads] == list(range(6))


def test_an_expert_is_asked_for_as_often_as_one_likes_and_read_once() -> None:
    modules, checkpoint = alike(1)
    with Rig(modules, checkpoint, 1) as rig:
        rig.route(modules[0], 3)
        first = rig.get(modules[0], 3)
        first.tensors = {"kept": torch.zeros(1)}
        assert rig.get(modules[0], 3) is first
        assert len(rig.reads) == 1
        rig.call(modules[0], 4)
        assert rig.get(modules[0], 3).tensors is None, "what was made of memory that is another's by now"


def test_seconds_waiting_are_counted() -> None:
    modules, checkpoint = alike(1)
    with Rig(modules, checkpoint, 1, slow=0.02) as rig:
        assert rig.stream.seconds_waiting == 0
        rig.call(modules[0], *range(6))
        assert rig.stream.seconds_waiting > 0


@pytest.mark.parametrize("slots", range(1, 9))
def test_a_union_larger_than_the_slots_with_the_last_of_it_kept(slots: int) -> None:
    """What is kept already fills every slot, and is not what is needed first: it has to give way."""
    (module, *_), checkpoint = alike(1, 8)
    with Rig([module], checkpoint, slots) as rig:
        for _ in range(3):
            rig.call(module, *range(8 - slots, 8))
            rig.call(module, *range(8))


@pytest.mark.parametrize("slots", [1, 2, 3, 6, 12])
def test_back_and_forth_within_a_call(slots: int) -> None:
    """Code that goes through the experts once for each of their weights."""
    modules, checkpoint = alike(2, 6)
    with Rig(modules, checkpoint, slots) as rig:
        for module in (*modules, *modules):
            rig.route(module, *range(6))
            for expert in (*range(6), *range(6), *reversed(range(6)), 0, 5, 2):
                rig.get(module, expert)
            rig.leave()
        if slots == 12:
            assert len(rig.reads) == 12


def test_experts_that_were_announced_and_never_asked_for() -> None:
    modules, checkpoint = alike(2, 6)
    with Rig(modules, checkpoint, 3, slow=0.001) as rig:
        for _ in range(4):
            for module in modules:
                rig.route(module, *range(6))
                rig.get(module, 5)
            rig.route(modules[0], *range(6))
            rig.leave()
        rig.is_whole()


def test_what_nobody_announced_is_read_all_the_same() -> None:
    modules, checkpoint = alike(2, 6)
    with Rig(modules, checkpoint, 2) as rig:
        for expert, module in itertools.product((0, 3, 5, 0), modules):
            rig.get(module, expert)
        assert rig.stream.counts.calls == 0 and rig.stream.counts.routed == 8
        assert not any(any(tokens) for tokens in rig.stream.counts.tokens.values())


def test_a_call_of_another_module_within_a_call() -> None:
    modules, checkpoint = alike(2, 6)
    with Rig(modules, checkpoint, 4) as rig:
        rig.route(modules[0], 0, 1, 2)
        rig.get(modules[0], 0)
        rig.call(modules[1], 3, 4, 5)
        for expert in (1, 2, 0):
            rig.get(modules[0], expert)


# -- prefetched


def filled(rig: Rig) -> None:
    """A cache without a free slot, as it is when prefetching begins: with the last module's experts."""
    for module in rig.modules:
        rig.call(module, *range(module.count))
    assert rig.stream.prefetches
    rig.reads.clear()


def firsts(rig: Rig) -> list[Part]:
    return [layout.placed[0].part for layout in rig.reads]


def test_prefetched_rightly_is_read_before_the_router_has_chosen() -> None:
    modules, checkpoint = alike(2, 8)
    with Rig(modules, checkpoint, 8) as rig:
        assert not rig.stream.prefetches, "while there is room the drive is what is waited for"
        filled(rig)
        rig.route(modules[1], 0)
        rig.stream.prefetch("m0", [5, 3])
        rig.get(modules[1], 0)
        rig.leave()
        assert firsts(rig) == [Part("m0.w", 5, 1), Part("m0.w", 3, 1)]
        before = rig.stream.counts.hits
        rig.call(modules[0], 3, 5, 6)
        assert firsts(rig)[2:] == [Part("m0.w", 6, 1)]
        counts = rig.stream.counts
        assert (counts.prefetched, counts.hits, counts.misses) == (2, before, counts.routed - before - 2)


def test_prefetched_wrongly_is_taken_back_and_not_counted() -> None:
    modules, checkpoint = alike(2, 8)
    with Rig(modules, checkpoint, 8) as rig:
        filled(rig)
        rig.readers.pause()
        rig.stream.prefetch("m0", [5, 3])
        rig.readers.resume()
        rig.disk.gate.clear()
        rig.stream.prefetch("m0", [1])
        rig.disk.gate.set()
        rig.call(modules[0], 6)
        rig.call(modules[0], 5, 3, 1)
        rig.readers.settle()
        assert rig.stream.counts.nbytes == rig.readers.bytes_read


def test_what_was_half_taken_back_is_never_computed_with() -> None:
    """Some of its reads had begun, the others never will: whoever wants it after all has it read anew."""
    (module, *rest), checkpoint = alike(2, 8, elements=40_000)
    for ask in ("routed", "unannounced", "prefetched again"):
        with Rig([module, *rest], checkpoint, 8) as rig:
            filled(rig)
            rig.disk.gate.clear()
            rig.stream.prefetch("m0", [5, 6])
            while not rig.readers._shared.reading:
                pass
            rig.call(rest[0], next(expert for number, expert in rig.stream._cache.held() if number))
            opener = threading.Timer(0.01, rig.disk.gate.set)
            opener.start()
            if ask == "routed":
                rig.route(module, 5, 6)
            elif ask == "prefetched again":
                rig.stream.prefetch("m0", [5, 6])
            for expert in (5, 6):
                rig.get(module, expert)
            opener.join()
            rig.readers.settle()
            assert rig.stream.counts.nbytes == rig.readers.bytes_read


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 8])
def test_prefetching_leaves_room_for_what_is_needed_now(slots: int) -> None:
    modules, checkpoint = alike(2, 8)
    with Rig(modules, checkpoint, slots) as rig:
        for _ in range(3):
            for module in modules:
                rig.stream.prefetch("m0", range(8))
                rig.stream.prefetch("m1", range(8))
                assert len(rig.stream._prefetched) <= slots // 2
                rig.call(module, *range(8))


def test_a_prefetched_expert_s_error_is_raised_only_if_it_is_wanted_and_still_there() -> None:
    modules, checkpoint = alike(2, 8)
    with Rig(modules, checkpoint, 8) as rig:
        filled(rig)
        rig.disk.broken = ReadError("broken")
        rig.stream.prefetch("m0", [5, 3])
        rig.readers.settle()
        rig.disk.broken = None
        rig.call(modules[1], 0)
        rig.stream.prefetch("m0", [3, 5])
        rig.call(modules[0], 3, 5)
        rig.disk.broken = ReadError("broken")
        rig.stream.prefetch("m1", [1, 2])
        rig.readers.settle()
        rig.disk.broken = None
        rig.call(modules[1], 1, 2)


def test_prefetched_and_then_less_memory() -> None:
    modules, checkpoint = alike(2, 8)
    with Rig(modules, checkpoint, 8, slow=0.002) as rig:
        filled(rig)
        rig.stream.prefetch("m0", range(8))
        rig.stream.shrink(2)
        assert not rig.stream._prefetched
        rig.call(modules[0], *range(8))
        rig.readers.settle()
        assert rig.stream.counts.nbytes == rig.readers.bytes_read


# -- less memory


@pytest.mark.parametrize("seed", range(16))
def test_fewer_slots_from_now_on(seed: int) -> None:
    modules, checkpoint = scene(seed)
    total = sum(module.count for module in modules)
    with Rig(modules, checkpoint, total, seed, slow=0.0003) as rig:
        for slots in (total, max(total // 2, 1), max(total // 2, 1), 2, 1, 5):
            rig.any_call(rough=True)  # which may still be under way
            rig.held = None
            rig.stream.shrink(slots)
            assert rig.stream.slots == len(rig.stream._areas) <= max(slots, 1)
            for _ in range(4):
                rig.any_call(rough=False)
                assert len(rig.stream._kept) <= rig.stream.slots
        assert rig.stream.slots == 1


def test_what_is_worth_most_stays_when_there_is_less_memory() -> None:
    (module,), checkpoint = alike(1, 6)
    with Rig([module], checkpoint, 6) as rig:
        for expert in (*range(6), *[1, 4] * 20):
            rig.call(module, expert)
        rig.stream.shrink(2)
        before = len(rig.reads)
        rig.call(module, 1, 4)
        assert len(rig.reads) == before


# -- faults


@pytest.mark.parametrize("slots", [1, 2, 6, 12])
@pytest.mark.parametrize("how", ["error", "truncated"])
def test_a_reader_s_error_is_raised_as_itself_and_the_next_call_works(slots: int, how: str) -> None:
    modules, checkpoint = alike(2, 6)
    error = ReadError("reading 'a' failed: Input/output error")
    with Rig(modules, checkpoint, slots) as rig:
        for module in modules:
            rig.call(module, 0, 1)
        for expert in (3, 4, 5):
            rig.disk.broken, rig.disk.cut_at = (error, None) if how == "error" else (None, 5000)
            rig.route(modules[1], 2, expert)
            with pytest.raises((ReadError, TruncatedError)) as caught:
                rig.get(modules[1], expert)
            assert how == "truncated" or caught.value is error
            rig.held = None
            if how == "truncated":
                assert "a ends at byte 5000" in str(caught.value)
                rig.call(modules[0], 0)  # lies before the cut
            rig.disk.broken = rig.disk.cut_at = None
            rig.call(modules[1], 0, expert)
        if slots <= 6:
            rig.is_whole()


@pytest.mark.parametrize("asked", [(), (5,), (0, 5)])
def test_an_error_of_an_expert_that_nobody_asked_for_is_nobody_s(asked: tuple[int, ...]) -> None:
    """Its file may be whole again when it is asked for."""
    (module,), checkpoint = alike(1, 6, elements=4096)
    with Rig([module], checkpoint, 6) as rig:
        rig.call(module, *asked)
        rig.disk.cut_at = 2 * 4096 * 2  # behind expert 1
        rig.route(module, *range(6))
        for expert in asked:
            rig.get(module, expert)
        rig.readers.settle()
        rig.leave()
        rig.disk.cut_at = None
        rig.call(module, *range(6))


def test_an_error_in_one_expert_leaves_the_others_kept() -> None:
    (module,), checkpoint = alike(1, 6)
    with Rig([module], checkpoint, 6) as rig:
        rig.call(module, 0, 1, 2)
        rig.disk.broken = ReadError("broken")
        with pytest.raises(ReadError):
            rig.call(module, 5)
        before = len(rig.reads)
        rig.call(module, 0, 1, 2)
        assert len(rig.reads) == before
        rig.disk.broken = None
        rig.call(module, 5)
        rig.is_whole()


@pytest.mark.parametrize("slots", [1, 3])
def test_closing_wakes_the_model_that_waits(slots: int) -> None:
    modules, checkpoint = alike()
    with Rig(modules, checkpoint, slots) as rig:
        rig.call(modules[0], 0)
        rig.disk.gate.clear()
        raised: list[BaseException] = []

        def model() -> None:
            try:
                rig.call(modules[1], 1, 2)
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
        rig.stream.leave()
        rig.disk.gate.set()
        closer.join()
        with pytest.raises(ClosedError):
            rig.call(modules[1], 3)
        rig.stream.leave()
        rig.stream.shrink(1)


FILES = [module.__file__ for module in (stream_module, cache_module, readers_module)]


def interrupted_at(line: int, work: Callable[[], None]) -> bool:
    """Whether `work` was interrupted before the line of that number that it came to in the stream's own code."""
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        # where a `with` ends no interrupt comes: no bytecode that looks for one stands before its exit
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()[:5] != "with ":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(("slots", "device_slots"), [(1, 0), (2, 0), (4, 0), (2, 1), (2, 3), (4, 2)])
def test_an_interrupt_at_any_line_leaves_the_next_call_right(slots: int, device_slots: int) -> None:
    """Ctrl-C comes between any two lines, here at each in turn: nobody has another's bytes, and no slot is lost."""
    modules, checkpoint = alike(2, 5, elements=64)

    def work() -> None:
        rig.call(modules[0], 0, 1)
        rig.stream.prefetch("m1", [2, 0])
        rig.call(modules[1], 0, 1, 2)
        rig.stream.prefetch("m0", [3])
        rig.route(modules[0], 2, 4)
        for expert in (4, 2, 3):
            rig.get(modules[0], expert)

    device = FakeDevice(slots, 0.3) if device_slots else None
    rig = Rig(modules, checkpoint, slots, device=device, device_slots=device_slots)
    with rig:
        assert not interrupted_at(1 << 60, work)
        line = step = 0
        while True:
            step = step % 7 + 1
            line += step
            if not interrupted_at(line, work):
                break
            rig.is_whole()
        if device is not None:
            device.finish()
            assert device.failures == []
    assert line > 300


@pytest.mark.parametrize("slots", [2, 4])
def test_an_interrupt_while_the_memory_shrinks(slots: int) -> None:
    for line in range(1, 200):
        modules, checkpoint = alike(1, 5, elements=64)
        with Rig(modules, checkpoint, 5) as rig:
            rig.call(modules[0], *range(5))
            interrupted = interrupted_at(line, lambda rig=rig: rig.stream.shrink(slots))  # type: ignore[misc]
            rig.is_whole()
            rig.stream.shrink(slots)
            assert rig.stream.slots == len(rig.stream._areas) == slots
            rig.is_whole()
        if not interrupted:
            return
    raise AssertionError("a shrink that never ends")


# -- a device above the memory


def on_device(seed: int, *, rough: bool, calls: int = 25, interrupts: bool = False) -> list[str]:
    """Calls over a device; what its computations saw that was wrong."""
    rng = random.Random(seed)
    modules, checkpoint = scene(seed)
    device = FakeDevice(seed, *MANNERS[seed % len(MANNERS)])
    slots, device_slots = slots_of(modules, rng), slots_of(modules, rng)
    with Rig(modules, checkpoint, slots, seed, 0.0002 if seed % 4 == 0 else 0.0, device, device_slots) as rig:
        for turn in range(calls):
            rig.disk.broken = ReadError("broken") if rough and turn % 9 == 4 else None
            try:
                if interrupts:
                    interrupted_at(rng.randint(1, 400), lambda: rig.any_call(rough=rough) and None)
                else:
                    rig.any_call(rough=rough and turn % 3 > 0)
            except ReadError:
                rig.held = None
            if rough and turn == calls // 2:
                rig.stream.shrink(max(slots // 2, 1), max(device_slots // 2, 1))
        rig.leave()
        device.finish()
    return device.failures


@pytest.mark.parametrize("seed", SEEDS)
def test_no_computation_sees_wrong_bytes(seed: int) -> None:
    assert on_device(seed, rough=False) == []


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_no_computation_sees_wrong_bytes_in_rough_calls(seed: int) -> None:
    assert on_device(seed, rough=True) == []


@pytest.mark.parametrize("seed", range(2000, 2040))
def test_no_computation_sees_wrong_bytes_after_interrupts(seed: int) -> None:
    assert on_device(seed, rough=False, interrupts=True) == []


@pytest.mark.parametrize("favourite", ["copy", "compute"])
@pytest.mark.parametrize("device_slots", [1, 2, 3, 6])
def test_back_and_forth_on_a_device(device_slots: int, favourite: str) -> None:
    """An expert that is asked for again takes the place of one whose computation may not have begun."""
    modules, checkpoint = alike(2, 6)
    device = FakeDevice(0, 0.0, favourite)
    with Rig(modules, checkpoint, 3, device=device, device_slots=device_slots) as rig:
        for module in (*modules, *modules):
            rig.route(module, *range(6))
            for expert in (*range(6), *range(6), *reversed(range(6)), 0, 5, 2):
                rig.get(module, expert)
            rig.leave()
        device.finish()
    assert device.failures == []


def test_what_the_device_holds_is_not_read_again() -> None:
    modules, checkpoint = alike(1, 6)
    device = FakeDevice(0, 0.3)
    with Rig(modules, checkpoint, 2, device=device, device_slots=6) as rig:
        for _ in range(4):
            rig.call(modules[0], *range(6))
        assert len(rig.reads) == 6 and rig.stream.counts.hits == 18
        device.finish()
    assert device.failures == []


def test_the_two_tiers_hold_more_than_either() -> None:
    """What is on the device as well goes first from the memory."""
    modules, checkpoint = alike(1, 8)
    device = FakeDevice(0, 0.3)
    with Rig(modules, checkpoint, 4, device=device, device_slots=5) as rig:
        for turn in range(30):
            rig.call(modules[0], *range(4))  # stay on the device, and one of the others comes and goes there
            rig.call(modules[0], 4 + turn % 4)
            if turn == 20:
                before = len(rig.reads)
        assert len(rig.reads) == before
        device.finish()
    assert device.failures == []


def forgetful(self: ExpertStream, slot: int) -> None:
    """A `_wait_for_copy` that does not wait."""
    self._busy_until.pop(slot, None)


@pytest.mark.parametrize("wait", ["copy after use", "use after copy", "read after copy", "last use"])
def test_each_wait_is_needed(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it some interleaving gives a computation wrong bytes: the tests above can fail."""
    if wait == "copy after use":
        plain = FakeDevice.copy

        def at_once(self: FakeDevice, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
            return plain(self, target, source, None)

        monkeypatch.setattr(FakeDevice, "copy", at_once)
    elif wait == "use after copy":
        monkeypatch.setattr(FakeDevice, "compute_after", lambda self, event: None)
    elif wait == "read after copy":
        monkeypatch.setattr(ExpertStream, "_wait_for_copy", forgetful)
    else:
        monkeypatch.setattr(ExpertStream, "_used", lambda self, key: None)
    for seed in SEEDS:
        if on_device(seed, rough=False):
            return
    raise AssertionError(f"nobody noticed that {wait!r} is gone")
