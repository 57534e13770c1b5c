"""Which experts are kept, which one goes when another comes, and how much there is time to read ahead.

What an expert is worth is how often tokens were routed to it lately: the share of its layer's tokens, in a slow and a
fast moving average, and a little less the longer it takes until its layer comes round again. What is worth least
goes first, whichever layer it belongs to. The cache knows no memory and no files: it hands out numbers of slots.

Other ways to choose were compared on routing traces: the figures are in `docs/log.md`. Least recently used, the usual
one, finds nothing at all while the cache is smaller than a pass's working set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

NEW = 0.1  # part of a new measurement in the moving averages
NOTICED = 50e-6  # seconds: a shorter wait is none


SLOW, FAST = 0.98, 0.5  # what is left of an average, a token later
SLOW_PART = 0.8  # of the slow average in the share
FARTHEST = 0.25  # what a whole pass until the next use takes from the logarithm of the share
NEVER = 1e-9  # the share of what was not used

Key = tuple[int, int]  # number of the module in the order of a pass, number of its expert


class ExpertCache:
    """Keys in a fixed number of slots.

    Args:
        slots: how many keys it holds.
        counts: experts of each module, in the order of a pass.
    """

    def __init__(self, slots: int, counts: Sequence[int]) -> None:
        self.slots = slots
        self._slot: dict[Key, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._kept: list[set[int]] = [set() for _ in counts]
        self._slow = [[0.0] * count for count in counts]
        self._fast = [[0.0] * count for count in counts]
        self._now = 0  # the module that is being computed
        self._least: list[tuple[float, int] | None] = [None] * len(counts)  # share and expert, where it is known

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def held(self) -> list[Key]:
        """The keys that have a slot."""
        return list(self._slot)

    def slot(self, key: Key) -> int | None:
        """The slot of a key, None where it is not kept."""
        return self._slot.get(key)

    def saw(self, module: int, tokens: Mapping[int, int], total: int) -> None:
        """A call of `module` with `total` tokens, of which `tokens` went to each expert."""
        self._now = module
        for averages, kept in ((self._slow, SLOW), (self._fast, FAST)):
            left = kept ** max(total, 1)
            own = [average * left for average in averages[module]]
            for expert, count in tokens.items():
                own[expert] += (1 - left) * count / max(total, 1)
            averages[module] = own
        self._least[module] = None

    def worth(self, key: Key) -> float:
        """What keeping an expert is worth now: higher is better."""
        return self._worth(key[0], self._share(*key))

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return not self._free

    def take(self, key: Key, keep: Collection[Key] = ()) -> tuple[int, Key | None] | None:
        """A slot for a key that has none, and the key that had to go for it.

        Args:
            keep: keys that must stay.

        Returns:
            None where every slot holds one of `keep`.
        """
        gone = None
        if not self._free:
            gone = self._worst(keep)
            if gone is None:
                return None
            self.drop(gone)
        slot = self._free.pop()
        self._slot[key] = slot
        self._kept[key[0]].add(key[1])
        self._least[key[0]] = None
        return slot, gone

    def drop(self, key: Key) -> int | None:
        """Forget a key; its slot is free."""
        slot = self._slot.pop(key, None)
        if slot is not None:
            self._kept[key[0]].discard(key[1])
            self._least[key[0]] = None
            self._free.append(slot)
        return slot

    def shrink(self, slots: int) -> list[int]:
        """Have at most `slots` slots from now on; the numbers of those that are given up."""
        while len(self._slot) > slots:
            self.drop(min(self._slot, key=self.worth))
        surplus = max(self.slots - slots, 0)
        self.slots -= surplus
        given_up, self._free = self._free[:surplus], self._free[surplus:]
        return given_up

    def mend(self, slots: Iterable[int]) -> None:
        """After an interrupt halfway: `slots` are all there are; those without an expert are free."""
        every = set(slots)
        self._slot = {key: slot for key, slot in self._slot.items() if slot in every}
        self._free = sorted(every.difference(self._slot.values()), reverse=True)
        self._kept = [set() for _ in self._kept]
        for module, expert in self._slot:
            self._kept[module].add(expert)
        self._least = [None] * len(self._kept)
        self.slots = len(every)

    def _share(self, module: int, expert: int) -> float:
        return SLOW_PART * self._slow[module][expert] + (1 - SLOW_PART) * self._fast[module][expert]

    def _worth(self, module: int, share: float) -> float:
        modules = len(self._kept)
        distance = ((module - self._now - 1) % modules + 1) / modules
        return math.log(max(share, NEVER)) - FARTHEST * distance

    def _worst(self, keep: Collection[Key]) -> Key | None:
        """The kept key of least worth that may go."""
        found = []
        staying = {module for module, _ in keep}
        for other, kept in enumerate(self._kept):
            if other in staying:
                able = [(self._share(other, expert), expert) for expert in kept if (other, expert) not in keep]
                least = min(able, default=None)
            else:
                least = self._least[other]
                if least is None and kept:
                    least = self._least[other] = min((self._share(other, expert), expert) for expert in kept)
            if least is not None:
                found.append((self._worth(other, least[0]), (other, least[1])))
        return min(found)[1] if found else None


class Idle:
    """Measures, from call to call, the time in which nothing is asked of the drive, and the rate at which it delivers.

    Times are seconds of one clock.
    """

    def __init__(self) -> None:
        self._seconds = self._rate = 0.0
        self._place = -1
        self._asked = 0
        self._began = self._done = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that fit into the time between the last expert of one call and the router of the next."""
        return int(self._seconds * self._rate)

    def call(self, now: float, place: int) -> None:
        """A call begins; `place` is its module's in the order of a pass."""
        if self._place >= 0:
            if self._asked and self._done > self._began:
                self._rate = _mixed(self._rate, self._asked / (self._done - self._began))
            if place > self._place:  # between two passes a token is chosen: that is another matter
                self._seconds = _mixed(self._seconds, now - self._done)
        self._place, self._asked, self._began, self._done = place, 0, now, now

    def asked(self, nbytes: int) -> None:
        """So much was asked of the drive for this call."""
        self._asked += nbytes

    def waited(self, began: float, now: float) -> None:
        """The model stood still for something that was asked."""
        if now - began > NOTICED:
            self._done = now


def _mixed(average: float, value: float) -> float:
    return value if not average else (1 - NEW) * average + NEW * value
