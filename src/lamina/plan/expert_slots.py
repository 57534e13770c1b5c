"""Experts that are read when a token is routed to them, and how much memory to keep some of them in.

Of a mixture-of-experts layer a token needs a few experts, so they are no part of what streams by in every pass:
each is read as one when the router has chosen, into a slot of an expert cache that keeps those likely to be
needed again. All slots have one size, that of the largest expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lamina.plan.layout import ALIGNMENT, Layout, Part, align, lay_out
from lamina.plan.schedule import Cut, Schedule, Weight

KNOWN = 2048  # bytes of memory for what is known of an expert: where it is, how often it was wanted
IN_FLIGHT = 128 << 20  # bytes of experts on their way at once, that keep a drive busy


@dataclass(frozen=True)
class Experts:
    """The experts of one module.

    Attributes:
        module: whose forward picks them.
        weights: the tensors that hold them, one expert after another along dimension 0.
        count: how many there are.
        routed: how many a token is sent to, at most `count`.
    """

    module: str
    weights: tuple[Weight, ...]
    count: int
    routed: int

    def layout(self, expert: int) -> Layout:
        """Where the tensors of one expert lie in its slot."""
        own = [weight for weight in self.weights if expert < weight.experts]
        rows = [weight.rows // weight.experts for weight in own]
        return lay_out([(w, Part(w.name, expert * n, n)) for w, n in zip(own, rows, strict=True)], gap=0)

    @property
    def slot_bytes(self) -> int:
        """Bytes that hold any one of them, wherever it lies in its files."""
        return align(sum(_most(weight) for weight in self.weights))

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk of all of them."""
        return sum(weight.stored_nbytes for weight in self.weights)

    @property
    def routed_bytes(self) -> int:
        """Bytes on disk of those that one token is sent to."""
        return sum(weight.stored_nbytes // weight.experts * self.routed for weight in self.weights)


def _most(weight: Weight) -> int:
    """Bytes that one expert's part of a weight may take, with the worst alignment of its place on disk."""
    rows = weight.rows // weight.experts
    stored = weight.stored_nbytes // weight.experts
    if weight.segments:
        ranges = (weight.stored_range(expert * rows, rows) for expert in range(weight.experts))
        stored = max(end - begin for begin, end in ranges)
    stored = align(stored) + ALIGNMENT
    return stored + align(weight.unpacked_nbytes // weight.experts) if weight.converted else stored


def experts_of(schedule: Schedule, movable: Iterable[Weight]) -> tuple[Experts, ...]:
    """The experts modules of a pass, in order, each with those of its weights that are used by no other module."""
    candidates = {w.name: w for w in movable if w.cut is Cut.EXPERTS and w.by_rows}
    users: dict[str, set[str]] = defaultdict(set)
    modules: dict[str, dict[str, None]] = defaultdict(dict)
    for call in schedule.root.walk():
        for name in call.touches:
            if name in candidates:
                users[name].add(call.module)
                modules[call.module][name] = None
    own = {module: [candidates[n] for n in names if len(users[n]) == 1] for module, names in modules.items()}
    return tuple(_module(module, weights, schedule.routed.get(module, 0)) for module, weights in own.items() if weights)


def _module(module: str, weights: Sequence[Weight], routed: int) -> Experts:
    """The experts of one module; where the number that a token is sent to is unknown, it is all of them."""
    count = max(weight.experts for weight in weights)
    return Experts(module, tuple(weights), count, min(routed or count, count))


@dataclass(frozen=True)
class Division:
    """How a budget's room for weights is divided: bytes for what every pass needs, and slots of the expert cache."""

    dense_bytes: int
    slots: int


def divide(experts: Sequence[Experts], dense_bytes: int, dense_needed: int, room: int) -> Division:
    """Divide `room` by expected bytes saved.

    A byte of a dense weight that stays saves a byte of reading in every pass. A byte of the expert cache saves
    one only as often as its expert is routed to: `routed / count` of the passes if all are alike, and never
    more than once. So the dense weights come first, and the cache has what they leave; but it has at least one
    slot, for an expert must be somewhere while it is computed, and, as far as a quarter of the room reaches, as
    many as a layer's experts need to be read at once.

    Args:
        experts: the experts modules.
        dense_bytes: that all dense weights together take.
        dense_needed: least bytes of the window that dense weights stream through.
        room: bytes for both.
    """
    slot = slot_bytes(experts)
    total = sum(module.count for module in experts)
    if not total:
        return Division(room, 0)
    at_once = max(max(module.routed for module in experts) + 1, IN_FLIGHT // slot)
    wanted = max(1, min(at_once, total, int(room * 0.25) // slot))
    wanted = min(wanted, max((room - dense_needed) // slot, 1))
    left = room - wanted * slot - dense_bytes
    slots = min(wanted + max(left, 0) // slot, total)
    return Division(room - slots * slot, slots)


def slot_bytes(experts: Iterable[Experts]) -> int:
    """Bytes of a slot of the cache."""
    return max((module.slot_bytes for module in experts), default=0)


def names_of(experts: Iterable[Experts]) -> Mapping[str, Weight]:
    """The weights of all experts, by name."""
    return {weight.name: weight for module in experts for weight in module.weights}
