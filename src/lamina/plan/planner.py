"""What lives where: a pure function from a schedule, a budget and the hardware to a frozen plan.

A pass is a cyclic scan, so what is resident is fixed: keeping any 80% of the weights saves 80% of the
reading, while a cache that evicts the least recently used would save nothing. Three choices are made:

1. the size of a unit: as large as the budget allows, at most a decoder layer, at least one linear or a
   block of its rows, so that the window stays small and the reads stay long;
2. the ring: enough for reads to run ahead while the model computes;
3. the resident units: as many as the rest of the memory holds, spread evenly through the pass, so that the disk
   never idles.

Experts are no part of the scan: they are read when a token is routed to them, and have what the dense weights
leave as a cache (`lamina.plan.expert_slots`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lamina.caller import option
from lamina.errors import BudgetError
from lamina.plan.expert_slots import KNOWN, divide, experts_of, names_of, slot_bytes
from lamina.plan.forecast import CALL_OPERATIONS, EXPERT_OPERATIONS, UNTRACED_OPERATIONS, Hardware
from lamina.plan.layout import Item, Part, align, cut_up, lay_out, widest_window
from lamina.plan.plan import Budget, Plan
from lamina.plan.schedule import Call, Schedule, Weight
from lamina.sizes import LEAST_MEANT, enough_size, format_size, meant, short_size

MB = 1 << 20
UNIT_SIZES = (32 * MB, 16 * MB, 8 * MB, 4 * MB, 2 * MB, MB, 256 * 1024, 64 * 1024, 16 * 1024, 0)
OWN_AREA = MB  # a resident weight this large has an area of its own
SETTLING = 4  # attempts to fit ring and residents to each other
MOST_UNITS = 4_000  # of a pass: finer than that costs more in bookkeeping than it saves in memory
RING_WANTED = 192 * MB
RING_LEAST = 24 * MB  # units are made smaller until a ring of this size or of `RING_SHARE` holds them
RING_SHARE = 0.35  # of what is left for weights, where the wanted ring is more


def resident_size(weights: Iterable[Weight]) -> int:
    """Bytes of the areas that hold these weights, finished."""
    return sum(area_size(group) for group in resident_areas(weights))


def resident_areas(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Weights by the area they live in: a large one in its own, so that it can be given back alone."""
    small: list[Weight] = []
    areas = []
    for weight in weights:
        if weight.nbytes >= OWN_AREA or weight.converted:
            areas.append([weight])
        else:
            small.append(weight)
    return [small, *areas] if small else areas


def area_size(weights: Sequence[Weight]) -> int:
    """Bytes of one area."""
    if len(weights) == 1 and weights[0].converted:
        return align(weights[0].nbytes)
    return lay_out([(weight, Part(weight.name, 0, weight.rows)) for weight in weights]).nbytes


def make_plan(
    schedule: Schedule, budget: Budget, hardware: Hardware | None = None, keep: frozenset[str] | None = None
) -> Plan:
    """Decide what is resident, what streams and through how large a window.

    Args:
        schedule: the pass, from a traced model.
        budget: bytes given and bytes reserved.
        hardware: rates for the forecast.
        keep: where given, nothing else becomes resident: what a running model has in memory already.

    Raises:
        BudgetError: `budget.memory_bytes` is below the minimum, which the error states.
    """
    return _Planner(schedule, budget, hardware or Hardware(), keep).plan()


def minimum_memory(schedule: Schedule, budget: Budget) -> tuple[int, int]:
    """The smallest `memory_bytes` and `device_memory_bytes` that are enough for what `budget` has to hold."""
    return _Planner(schedule, budget, Hardware()).minimum()


def _streamable(schedule: Schedule, call: Call) -> list[Weight]:
    """The weights of a call that may stream, in the order of first use."""
    touched = [schedule.weights[name] for name in call.touched()]
    return [weight for weight in touched if not (weight.always or weight.gathered)]


class _Kinds:
    """The weights of a pass by what may be done with them.

    Attributes:
        always: small or special enough to be resident in every plan.
        gathered: of which rows are read when they are looked up.
        experts: modules whose weights are read when they are routed to.
        movable: the others, in the order of a pass: resident or streamed.
        aside: those of the branches, such as a vision tower, which such a pass does not go through. A large one that
            no call touches at all is in none of these: it is left on disk, and read when asked for.
    """

    def __init__(self, schedule: Schedule) -> None:
        weights = schedule.weights
        self.always = [w for w in weights.values() if w.always]
        self.gathered = [w for w in weights.values() if w.gathered and not w.always]
        passing = _streamable(schedule, schedule.root)
        self.experts = experts_of(schedule, passing)
        routed = names_of(self.experts)
        self.movable = [w for w in passing if w.name not in routed]
        self.aside = list(itertools.chain.from_iterable(_streamable(schedule, each) for each in schedule.branches))

    def bytes_per_token(self) -> tuple[int, int, int]:
        """What one token needs of them, wherever it is: all of it, of that the packed weights, and those unpacked."""
        dense = [(w, 1, 1) for w in (*self.always, *self.movable)]
        routed = [(w, w.experts, module.routed) for module in self.experts for w in module.weights]
        needed = [(w, w.stored_nbytes // of * some, w.unpacked_nbytes // of * some) for w, of, some in dense + routed]
        active = sum(stored for _, stored, _ in needed)
        packed = [(stored, unpacked) for w, stored, unpacked in needed if w.packed]
        return active, sum(stored for stored, _ in packed), sum(unpacked for _, unpacked in packed)


BranchCut = tuple[Call, tuple[Item, ...], tuple[int, ...]]
"""A branch, its units, and the order in which it needs them."""


class _Planner:
    def __init__(
        self, schedule: Schedule, budget: Budget, hardware: Hardware, keep: frozenset[str] | None = None
    ) -> None:
        self.schedule, self.budget, self.hardware, self.keep = schedule, budget, hardware, keep
        self.kinds = kinds = _Kinds(schedule)
        self.always, self.movable, self.experts, self.aside = kinds.always, kinds.movable, kinds.experts, kinds.aside
        self.always_names = frozenset(w.name for w in self.always)
        self.slot = slot_bytes(self.experts)
        self.known = KNOWN * sum(module.count for module in self.experts)
        self.always_bytes = resident_size(self.always)
        self.dense_bytes = resident_size([*self.always, *self.movable]) - self.always_bytes
        self.whole = resident_size(schedule.weights.values())
        finest = sum(w.nbytes for w in (*self.movable, *self.aside)) // MOST_UNITS
        self.sizes = [size for size in UNIT_SIZES if size >= finest] or [finest]
        self._cuts: dict[int, tuple[tuple[Item, ...], tuple[int, ...]]] = {}
        self._branch_cuts: dict[Any, list[BranchCut]] = {}
        self.least_ring = self._windows(self.sizes[-1])[0] if self.movable or self.aside else 0

    def minimum(self) -> tuple[int, int]:
        """Least bytes of memory, and of device memory."""
        budget = self.budget
        least = self.least_ring + self.slot
        weights = min(self.always_bytes + least, self.whole)
        if not budget.on_device:
            return budget.reserved_bytes + min(self.always_bytes + least + self.known, self.whole), 0
        host = least + self.known if self.always_bytes + least < self.whole else min(least + self.known, self.whole)
        return budget.reserved_bytes + host, budget.reserved_bytes_on_device + weights

    def plan(self) -> Plan:
        budget = self.budget
        self._check(*self.minimum())
        compute_room = budget.memory_bytes - budget.reserved_bytes
        if budget.device_memory_bytes is not None:
            compute_room = budget.device_memory_bytes - budget.reserved_bytes_on_device
        names = frozenset(self.schedule.weights)
        if self.whole <= compute_room and (self.keep is None or self.keep >= names):
            return self._finished(names)
        if not self.movable and not self.experts and not self.aside:
            return self._finished(self.always_names)
        room = compute_room - self.always_bytes - (0 if budget.on_device else self.known)
        host_room = budget.memory_bytes - budget.reserved_bytes - self.known if budget.on_device else room
        return self._divided(room, host_room)

    def _divided(self, room: int, host_room: int) -> Plan:
        """A plan for the dense weights, after the expert cache has its least share; it has the rest as well."""
        slots = divide(self.experts, self.dense_bytes, self.least_ring, room).slots
        dense_room = room - slots * self.slot
        host_slots = slots
        if self.budget.on_device:  # what the device cannot hold goes through the host in every pass, or stays there
            passing = self.dense_bytes - dense_room
            passing = passing + 2 * RING_WANTED if passing > 0 else 0
            host_slots = divide(self.experts, passing, self.least_ring if passing else 0, host_room).slots
        host = host_room - host_slots * self.slot
        if self._all_dense(dense_room):
            plan = self._finished(self.always_names | {w.name for w in self.movable})
        else:
            plan = self._sized(dense_room, host)
        return self._with_experts(plan, room, host_room) if self.experts else plan

    def _all_dense(self, room: int) -> bool:
        return (
            bool(self.experts)
            and not self.aside
            and self.dense_bytes <= room
            and self._may_stay(w.name for w in self.movable)
        )

    def _with_experts(self, plan: Plan, room: int, host_room: int) -> Plan:
        """The plan with a cache that has what the dense weights left."""
        total = sum(module.count for module in self.experts)
        resident = resident_size(self.schedule.weights[name] for name in plan.resident) - self.always_bytes
        left = min((room - resident - plan.ring_bytes) // self.slot, total)
        slots, device_slots = left, 0
        if self.budget.on_device:
            cached = sum(item.nbytes for item in plan.items if item.cached)
            slots, device_slots = min((host_room - plan.ring_bytes - cached) // self.slot, total), left
        return replace(plan, experts=self.experts, expert_slots=slots, expert_slot_bytes=self.slot,
                       device_expert_slots=device_slots)  # fmt: skip

    def _sized(self, room: int, host_room: int) -> Plan:
        """A plan with units as large as the room allows."""
        least_room = min(room, host_room)
        comfortable = [s for s in self.sizes if self._windows(s)[0] <= max(least_room * RING_SHARE, RING_LEAST)]
        size = next((s for s in comfortable if self._windows(s)[0] <= least_room), self.sizes[-1])
        return self._streamed(size, room, host_room)

    def _check(self, minimum: int, minimum_device: int) -> None:
        budget = self.budget
        draft = f" and a draft of {format_size(budget.draft_bytes)}" if budget.draft_bytes else ""
        less = f"a shorter {option('context')}" + (f" or {option('draft', 'none')}" if draft else "")
        if budget.override_bytes:
            draft += f" and {format_size(budget.override_bytes)} of weights that were written to, which stay in memory,"
        if budget.memory_bytes < minimum:
            raise BudgetError(
                f"{_given('memory', budget.memory_bytes)} is too small: this model with a context of "
                f"{budget.context_tokens} tokens{draft} needs at least {minimum} bytes ({format_size(minimum)})"
                f"{_held(budget, minimum)}; {_enough('memory', minimum)}, or {less}",
                minimum,
            )
        if budget.device_memory_bytes is not None and budget.device_memory_bytes < minimum_device:
            raise BudgetError(
                f"{_given('device_memory', budget.device_memory_bytes)} is too small: this model with a context of "
                f"{budget.context_tokens} tokens{draft} needs at least {minimum_device} bytes "
                f"({format_size(minimum_device)}) on the device; {_enough('device_memory', minimum_device)}, or {less}",
                minimum_device,
            )

    def _streamed(self, size: int, room: int, host_room: int) -> Plan:
        least, wanted = self._windows(size)
        ring = max(least, min(wanted, int(min(room, host_room) * RING_SHARE)))
        gaps = 0  # between small weights, in the one area that they share
        for _ in range(SETTLING):
            resident = self._with_branches(self._spread(size, room - ring - gaps), room - ring - gaps)
            items, steps = cut_up(self.schedule, self._streaming(resident), size)
            apart = self._cut_branches(size, resident)
            # what is left of a divided unit may now be moved as one
            needed = max(self._least_ring(items, steps), self._least_ring_of(apart))
            over = self._resident_bytes(resident) + ring - room
            if needed <= ring and over <= 0:
                break
            ring, gaps = max(ring, needed), gaps + (max(over, 0) if needed <= ring else 0)
        else:
            ring, resident = least, frozenset()
            items, steps = self._cut(size)
            apart = self._cut_branches(size)
        branches = []
        for _, some, order in apart:
            branches.append(tuple(step + len(items) for step in order))
            items = (*items, *some)
        cached: set[int] = set()
        if self.budget.on_device:
            cached = _even(items, range(len(items) - sum(len(some) for _, some, _ in apart)), host_room - ring)
        items = tuple(Item(x.module, x.block, x.parts, x.layout, i in cached) for i, x in enumerate(items))
        return replace(self._finished(resident | self.always_names, ring, items, steps), branches=tuple(branches))

    def _with_branches(self, resident: frozenset[str], room: int) -> frozenset[str]:
        """The resident weights with those of branches that fit as well, once all others are there."""
        if not resident.issuperset(w.name for w in self.movable):
            return resident
        room -= self._resident_bytes(resident)
        more = set[str]()
        for weight in self.aside:
            if self._may_stay([weight.name]) and (nbytes := resident_size([weight])) <= room:
                room -= nbytes
                more.add(weight.name)
        return resident | more

    def _cut_branches(self, size: int, resident: frozenset[str] = frozenset()) -> list[BranchCut]:
        """The branches in units of about `size` bytes, each with the order in which it needs them."""
        streaming = {w.name: w for w in self.aside if w.name not in resident}
        if (size, *streaming) not in self._branch_cuts:
            branches = ((call, replace(self.schedule, root=call)) for call in self.schedule.branches)
            cut = ((call, *cut_up(schedule, streaming, size)) for call, schedule in branches)
            self._branch_cuts[size, *streaming] = [(call, items, steps) for call, items, steps in cut if steps]
        return self._branch_cuts[size, *streaming]

    def _least_ring_of(self, apart: Iterable[BranchCut]) -> int:
        return max((self._least_ring(items, steps, call) for call, items, steps in apart), default=0)

    def _spread(self, size: int, room: int) -> frozenset[str]:
        """The weights that fit in `room`, chosen evenly through the pass; shared ones first, for they save most."""
        uses = {names: count for names, count in self._uses(size).items() if self._may_stay(names)}
        groups = {names: resident_size(self.schedule.weights[name] for name in names) for names in uses}
        chosen: list[tuple[str, ...]] = []
        for names in sorted(uses, key=lambda names: -uses[names]):
            if uses[names] > 1 and groups[names] <= room:
                room -= groups[names]
                chosen.append(names)
        once = [names for names in groups if uses[names] == 1]
        return frozenset(itertools.chain(*chosen, *_evenly(once, groups, room)))

    def _uses(self, size: int) -> Counter[tuple[str, ...]]:
        """The weights that units of `size` bytes move together, in order of first use, and how often a pass does."""
        items, steps = self._cut(size)
        used = (items[step] for step in steps if items[step].block == 0)
        return Counter(tuple(dict.fromkeys(part.weight for part in item.parts)) for item in used)

    def _may_stay(self, names: Iterable[str]) -> bool:
        """Whether these weights may become resident, or are already."""
        return self.keep is None or self.keep.issuperset(names)

    def _resident_bytes(self, resident: frozenset[str]) -> int:
        """What they add to the weights that are always resident."""
        weights = (w for w in (*self.movable, *self.aside) if w.name in resident)
        return resident_size([*self.always, *weights]) - self.always_bytes

    def _streaming(self, resident: frozenset[str]) -> dict[str, Weight]:
        return {w.name: w for w in self.movable if w.name not in resident}

    def _cut(self, size: int) -> tuple[tuple[Item, ...], tuple[int, ...]]:
        if size not in self._cuts:
            self._cuts[size] = cut_up(self.schedule, {w.name: w for w in self.movable}, size)
        return self._cuts[size]

    def _windows(self, size: int) -> tuple[int, int]:
        """Smallest ring that can make a pass with units of `size` bytes, and the ring that is wanted."""
        items, steps = self._cut(size)
        apart = self._cut_branches(size)
        least = max(self._least_ring(items, steps), self._least_ring_of(apart))
        largest = max(item.nbytes for some in (items, *(some for _, some, _ in apart)) for item in some)
        everything = sum(items[i].nbytes for i in steps)
        return least, max(least, min(max(RING_WANTED, 6 * largest), everything + largest))

    def _least_ring(self, items: Sequence[Item], steps: Sequence[int], root: Call | None = None) -> int:
        """What is held at once, and as much again as the largest run that the end of the ring may waste."""
        widest = widest_window(root or self.schedule.root, items, steps)
        return widest + max((item.nbytes for item in items), default=0)

    def _operations(self) -> int:
        calls = sum(1 for _ in self.schedule.root.walk())
        traced = self.schedule.operations or UNTRACED_OPERATIONS * calls
        return traced + CALL_OPERATIONS * calls + EXPERT_OPERATIONS * sum(module.routed for module in self.experts)

    def _finished(
        self,
        resident: frozenset[str],
        ring: int = 0,
        items: tuple[Item, ...] = (),
        steps: tuple[int, ...] = (),
    ) -> Plan:
        weights = self.schedule.weights
        minimum, minimum_device = self.minimum()
        active, packed, unpacked = self.kinds.bytes_per_token()
        return Plan(
            budget=self.budget,
            hardware=self.hardware,
            model_bytes=self.schedule.nbytes,
            parameters=sum(w.elements for w in weights.values()),
            resident=resident,
            gathered=frozenset(w.name for w in self.kinds.gathered if w.name not in resident),
            items=items,
            steps=steps,
            resident_bytes=sum(weights[name].nbytes for name in resident),
            ring_bytes=ring,
            minimum_memory_bytes=minimum,
            device_ring_bytes=ring if self.budget.on_device else 0,
            minimum_device_memory_bytes=minimum_device,
            traced=self.schedule.traced,
            active_bytes_per_token=active,
            encoded_bytes_per_token=packed,
            decoded_bytes_per_token=unpacked,
            operations_per_token=self._operations(),
            expert_count=sum(module.count for module in self.experts),
            expert_bytes=sum(module.stored_bytes for module in self.experts),
        )


def _given(name: str, nbytes: int) -> str:
    """The memory that was given; where it is implausibly little, with the size that may have been meant."""
    given = option(name, short_size(nbytes))
    return given if nbytes >= LEAST_MEANT else f"{given} (did you mean {meant(nbytes)}?)"


def _enough(name: str, nbytes: int) -> str:
    return f"give {option(name, enough_size(nbytes))} or more"


def _held(budget: Budget, minimum: int) -> str:
    """Which part of the least memory is not this model's."""
    if not budget.already_held_bytes:
        return ""
    others = "other libraries, data, the accelerator's driver" if budget.on_device else "other libraries or data"
    without = minimum - budget.already_held_bytes
    return (
        f", of which {format_size(budget.already_held_bytes)} are for what this process already holds besides "
        f"({others}): a process without it needs {without} bytes ({format_size(without)})"
    )


def _evenly(
    groups: Sequence[tuple[str, ...]], sizes: Mapping[tuple[str, ...], int], room: int
) -> list[tuple[str, ...]]:
    """Groups that together fit in `room`, spread through the sequence by error diffusion, gaps filled after."""
    own = [sizes[group] for group in groups]
    total = sum(own)
    if not total or total <= room:
        return list(groups)
    share = max(room, 0) / total
    chosen: set[int] = set()
    owed = 0.0
    left = room
    for i, size in enumerate(own):
        owed += share * size
        if size / 2 <= owed and size <= left:
            owed -= size
            left -= size
            chosen.add(i)
    for i, size in enumerate(own):
        if i not in chosen and size <= left:
            left -= size
            chosen.add(i)
    return [groups[i] for i in sorted(chosen)]


def _even(items: Sequence[Item], order: Iterable[int], room: int) -> set[int]:
    keys = [(str(i),) for i in order]
    chosen = _evenly(keys, {key: items[int(key[0])].nbytes for key in keys}, room)
    return {int(key[0]) for key in chosen}
