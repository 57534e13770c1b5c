"""What this machine has: memory that is free, memory that is used, and how fast its drive reads."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence

from lamina.checkpoint import Extent
from lamina.plan.layout import ALIGNMENT, Read, align
from lamina.stream.memory import Area
from lamina.stream.readers import Readers, Ticket

SETTINGS = ((8, 8 << 20), (4, 8 << 20), (16, 4 << 20), (4, 16 << 20), (2, 16 << 20))  # threads, bytes of a read

LARGE_BLOCK = 1 << 20  # bytes
KEPT_FREE = 16 << 20  # bytes at the top of the heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


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


def measure_disk(
    extents: Sequence[Extent],
    most_bytes: int | None = None,
    settings: Iterable[tuple[int, int]] = SETTINGS[:1],
    area: Area | None = None,
    most_seconds: float = math.inf,
) -> float:
    """Bytes per second at which the drive delivers these extents, nothing else going on: the best of `settings`.

    Args:
        extents: what to read, in order; each setting reads the same bytes.
        most_bytes: stop after about so many, spread over all extents.
        settings: pairs of threads and bytes of a read to try.
        area: memory to read into; of its own where None. A small one makes the reads smaller.
        most_seconds: begin no further read after that, for each setting.
    """
    best = 0.0
    for threads, chunk in settings:
        target = area or Area(threads * align(chunk))
        chunk = min(align(chunk), target.nbytes // threads // ALIGNMENT * ALIGNMENT) or ALIGNMENT
        threads = min(threads, target.nbytes // chunk)
        readers = Readers(threads, chunk)
        try:
            best = max(best, _rate(readers, list(_spans(extents, chunk, most_bytes)), chunk, target, most_seconds))
        finally:
            readers.close()
    return best


def _spans(extents: Sequence[Extent], chunk: int, most_bytes: int | None) -> Iterable[Read]:
    total = sum(extent.length for extent in extents)
    keep = 1.0 if most_bytes is None else min(1.0, most_bytes / max(total, 1))
    owed = 0.0
    for extent in extents:
        for begin in range(0, extent.length, chunk):
            owed += keep
            if owed < 1:
                continue
            owed -= 1
            offset = extent.offset + begin
            offset -= offset % ALIGNMENT
            needed = min(chunk, extent.offset + extent.length - offset)
            yield Read(extent.file, offset, align(needed), 0, needed, True)


def _rate(readers: Readers, reads: Sequence[Read], chunk: int, area: Area, most_seconds: float) -> float:
    places = area.nbytes // chunk
    tickets: list[Ticket] = []
    nbytes, began = 0, time.perf_counter()
    for i, read in enumerate(reads):
        if i >= places:
            readers.wait(tickets[i - places])
        if time.perf_counter() - began > most_seconds:
            break
        tickets.append(readers.submit([read], area, i % places * chunk))
        nbytes += read.needed
    for ticket in tickets:
        readers.wait(ticket)
    return nbytes / max(time.perf_counter() - began, 1e-9)
