"""This process and its machine: memory that is resident, free, allowed by control groups; and forks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

CGROUP = Path("/sys/fs/cgroup")
LARGE_BLOCK = 1 << 20  # bytes
KEPT_FREE = 16 << 20  # bytes at the top of the heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "none"
T = TypeVar("T")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def release_freed() -> None:
    """Let the C library give back what it keeps of freed memory: it is resident, and unused. No-op without glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Have the C library give blocks of 1 MB and more back when they are freed, as activations of a long prompt are.

    By itself glibc raises that bound to 32 MB and keeps up to 64 MB, so that what a pass leaves behind differs from
    run to run by more than it needs; and keys and values that grow token by token leave holes that nothing else fits.
    What the user set by an environment variable stays. No-op without glibc.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in _MALLOC_SETTINGS):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
            library.mallopt(_M_TRIM_THRESHOLD, KEPT_FREE)


def peak_resident_bytes() -> int:
    """The most resident memory this process ever had."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit(groups: str | None = None, root: Path = CGROUP) -> int | None:
    """The smallest memory limit of the control groups this process is in, v1 or v2; None for none.

    Args:
        groups: text of /proc/self/cgroup; read where None.
        root: where the control groups are mounted.
    """
    if groups is None:
        try:
            groups = Path("/proc/self/cgroup").read_text()
        except OSError:
            return None
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = (root if (root / "cgroup.controllers").exists() else root / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            limits.append(_limit(base.joinpath(*parts[:depth]) / name))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    if not text.isdigit() or int(text) >= NO_LIMIT:
        return None
    return int(text)


def free_memory() -> int:
    """Bytes this process could still take without swapping, seen through cgroup limits, its own use included."""
    beyond = int(psutil.virtual_memory().available)
    limit = memory_limit()
    own = resident_bytes()
    return beyond + own if limit is None else min(beyond + own, limit)


def watching_forks(**calls: Callable[[T], Any]) -> weakref.WeakSet[T]:
    """A set of objects that are called when this process forks, for as long as they live.

    Args:
        calls: what each is called with, by the names that `os.register_at_fork` has: `before`, `after_in_parent`,
            `after_in_child`. Never called where a process cannot fork.
    """
    living: weakref.WeakSet[T] = weakref.WeakSet()

    def every(call: Callable[[T], Any]) -> None:
        for each in list(living):
            call(each)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**{when: functools.partial(every, call) for when, call in calls.items()})
    return living
