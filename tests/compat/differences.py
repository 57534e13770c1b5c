"""Where the two ends of the supported range differ: the one table of it. docs/compatibility.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Difference(NamedTuple):
    """The figures of `compat.observed.Figures` that each version has its own of, and why."""

    figures: tuple[str, ...]
    because: str


DIFFERENCES: Mapping[str, Difference] = MappingProxyType(
    {
        "codegen": Difference(
            ("activation_bytes", "minimum_memory_bytes"),
            "rewritten in 5.24: attention by sdpa, before by its own code, which holds all scores in fp32",
        ),
    }
)
