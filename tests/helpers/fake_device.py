"""A device that does its work late: two queues whose work is interleaved as badly as the asked-for waits allow.

Nothing that is queued happens until somebody must know (an event is waited for) or chance says so, and then
whichever queue may go on goes on. A copy reads its source and a computation reads its memory only at that
moment, as on a real accelerator: whatever was overwritten too early is seen as wrong bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from lamina.stream.device import Event

POISON = 0x5A


@dataclass(eq=False)
class Mark:
    """An event: a place in a queue."""

    device: FakeDevice
    passed: bool = False

    def done(self) -> bool:
        self.device.idle()
        return self.passed

    def wait(self) -> None:
        while not self.passed:
            assert self.device.step(), "an event that never comes"


@dataclass(eq=False)
class _Work:
    after: Mark | None = None
    do: Callable[[], None] | None = None
    mark: Mark | None = None


@dataclass(eq=False)
class FakeDevice:
    """Implements `Device`.

    Attributes:
        eager: chance, at each look, that one more piece of work is done.
        favourite: the queue that goes first where both may ("copy", "compute", or either by chance).
    """

    seed: int = 0
    eager: float = 0.2
    favourite: str = ""
    copies: deque[_Work] = field(default_factory=deque)
    computes: deque[_Work] = field(default_factory=deque)
    failures: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def pin(self, tensor: torch.Tensor) -> None:
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        assert after is None or isinstance(after, Mark)
        self.copies.append(_Work(after=after))
        half = source.numel() // 2
        self.copies.append(_Work(do=partial(_copy, target[:half], source[:half])))
        mark = Mark(self)
        self.copies.append(_Work(do=partial(_copy, target[half:], source[half:]), mark=mark))
        self.idle()
        return mark

    def settle(self) -> None:
        while self.copies:
            assert self.step(), "the two queues wait for each other"

    def compute_after(self, event: Event) -> None:
        assert isinstance(event, Mark)
        self.computes.append(_Work(after=event))

    def computed(self) -> Event:
        mark = Mark(self)
        self.computes.append(_Work(mark=mark))
        self.idle()
        return mark

    def compute(self, do: Callable[[], str | None]) -> None:
        """Queue a computation; what it returns is a failure."""

        def run() -> None:
            failure = do()
            if failure is not None:
                self.failures.append(failure)

        self.computes.append(_Work(do=run))
        self.idle()

    def idle(self) -> None:
        """Time goes by: perhaps something is done."""
        while self.random.random() < self.eager and self.step():
            pass

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.copies and not self.computes, "the two queues wait for each other"

    def step(self) -> bool:
        """Do one piece of work of a queue that may go on; False where neither may."""
        queues = [queue for queue in (self.copies, self.computes) if queue and _ready(queue[0])]
        if not queues:
            return False
        preferred = {"copy": self.copies, "compute": self.computes}.get(self.favourite)
        queue = next((q for q in queues if q is preferred), None) or self.random.choice(queues)
        work = queue.popleft()
        if work.do is not None:
            work.do()
        if work.mark is not None:
            work.mark.passed = True
        return True


def _ready(work: _Work) -> bool:
    return work.after is None or work.after.passed


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
