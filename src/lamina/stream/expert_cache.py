"""Which experts are kept, and which one goes when another comes.

An expert's worth is how often tokens were routed to it lately: the share of its layer's tokens that went there,
older ones counting less and less. What is worth least goes first, whichever layer it belongs to. The cache knows
no memory and no files: it hands out numbers of slots. How the ways to choose compare is in `docs/log.md`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

DECAY = 0.98  # of what a token counts, by each token after it
FORGOTTEN = 2000  # tokens after which nothing of an older one is left
HIGHEST = 1e200  # of an inflated count, before all are brought down again

Key = tuple[int, int]  # number of the module, number of its expert


class ExpertCache:
    """Keys in a fixed number of slots.

    Args:
        slots: how many keys it holds.
        counts: experts of each module.
    """

    def __init__(self, slots: int, counts: Sequence[int]) -> None:
        self.slots = slots
        self._slot: dict[Key, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._kept: list[set[int]] = [set() for _ in counts]
        # an old count is never touched: new ones are inflated instead
        self._shares = [[0.0] * count for count in counts]
        self._inflation = [1.0] * len(counts)
        self._least: list[tuple[float, int] | None] = [None] * len(counts)

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def held(self) -> list[Key]:
        return list(self._slot)

    def slot(self, key: Key) -> int | None:
        """The slot of a key, None where it is not kept."""
        return self._slot.get(key)

    def saw(self, module: int, tokens: Mapping[int, int], total: int) -> None:
        """A call of `module` with `total` tokens, of which `tokens` went to each expert."""
        steps = min(max(total, 1), FORGOTTEN)
        shares = self._shares[module]
        self._inflation[module] *= DECAY**-steps
        gain = self._inflation[module] * (1 - DECAY**steps) / max(total, 1)
        for expert, count in tokens.items():
            shares[expert] += gain * count
        if self._inflation[module] > HIGHEST:
            self._shares[module] = [share / self._inflation[module] for share in shares]
            self._inflation[module] = 1.0
        self._least[module] = None

    def worth(self, key: Key) -> float:
        """The share of recent tokens that was routed to an expert."""
        return self._shares[key[0]][key[1]] / self._inflation[key[0]]

    def take(self, key: Key, keep: Container[Key] = ()) -> tuple[int, Key | None] | None:
        """A slot for a key that has none, and the key that had to go for it.

        Args:
            keep: keys that must stay.

        Returns:
            None where every slot holds one of `keep`.
        """
        gone = None
        if not self._free:
            gone = self._worst(key[0], keep)
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

    def _worst(self, module: int, keep: Container[Key]) -> Key | None:
        """The kept key of least worth that may go; only keys of `module` can be in `keep`."""
        worst: tuple[float, Key] | None = None
        for other, kept in enumerate(self._kept):
            if not kept:
                continue
            if other == module:
                shares = self._shares[other]
                able = [(shares[expert], expert) for expert in kept if (other, expert) not in keep]
                found = min(able, default=None)
            else:
                found = self._least[other]
                if found is None:
                    shares = self._shares[other]
                    found = self._least[other] = min((shares[expert], expert) for expert in kept)
            if found is not None:
                value = found[0] / self._inflation[other]
                if worst is None or value < worst[0]:
                    worst = (value, (other, found[1]))
        return worst[1] if worst is not None else None
