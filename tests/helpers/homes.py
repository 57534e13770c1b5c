"""Where the data of a weight is, in memory: a double for what an engine reads from disk."""

from __future__ import annotations

from typing import Any

import torch


class InMemory:
    """A home for a weight whose data is here.

    Args:
        whole: it may be read as a whole; else only rows of it.

    Attributes:
        reads: how often all of it was read.
    """

    def __init__(self, data: torch.Tensor, whole: bool = True) -> None:
        self.data, self.whole, self.reads = data, whole, 0

    def read(self) -> torch.Tensor:
        assert self.whole
        self.reads += 1
        return self.data

    def gather(self, ids: torch.Tensor) -> torch.Tensor | None:
        return None if self.whole else self.data[ids]

    def part(self, first: int, count: int) -> torch.Tensor:
        return self.data[first : first + count]

    def written(self) -> torch.Tensor:
        return self.data

    def scale(self, func: Any, number: float) -> bool:
        return False

    def replace(self, data: torch.Tensor) -> None:
        self.data = data
