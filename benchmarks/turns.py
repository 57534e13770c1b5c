"""The order in which things are measured side by side: in turns, so that a slow minute meets all alike."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from report import seconds, spread

Name = TypeVar("Name", bound=Hashable)


def order(names: Sequence[Name], turn: int) -> list[Name]:
    """The order of a round: each order is followed by itself backwards, then begun one later."""
    start = turn // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if turn % 2 else turned


def in_turns(names: Sequence[Name], rounds: int) -> Iterator[tuple[int, Name]]:
    """The number of the round, from 0, and what is to be measured next; in each round every name once."""
    return ((turn, name) for turn in range(rounds) for name in order(names, turn))


def ratios(found: Mapping[Name, Sequence[float]], one: Name, other: Name) -> list[float]:
    """The figures of one over those of the other, round by round: what changed between rounds is in neither."""
    return [a / b for a, b in zip(found[one], found[other], strict=True)]


def ranged(values: Sequence[float]) -> str:
    """Median (least - greatest)."""
    found = spread(values)
    return f"{seconds(found['median'])} ({seconds(found['min'])} - {seconds(found['max'])})"
