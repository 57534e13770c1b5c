"""How long work reports what is done: one callback for everything that takes its time."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage (`download`, `wait`, `check`, `split`, `verify`, `load`), bytes done and bytes in all.

Calls may come from other threads than the caller's, one call at a time.
"""
