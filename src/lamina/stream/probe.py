"""How fast the drive of this machine reads, nothing else going on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from lamina.checkpoint import Checkpoint, Extent
from lamina.plan.layout import ALIGNMENT, Read, align
from lamina.stream.direct_io import Area
from lamina.stream.readers import Readers, Ticket

SETTINGS = ((8, 8 << 20), (4, 8 << 20), (16, 4 << 20), (4, 16 << 20), (2, 16 << 20))
"""Threads and bytes of a read; the first is what the stream uses."""
DRIVE_BYTES = 1 << 30  # of a checkpoint, that are enough to know its drive by


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


def drive_rate(checkpoint: Checkpoint, seconds: float, room: int) -> float | None:
    """Bytes per second at which the checkpoint's bytes come; None for one that is still on the hub.

    Args:
        seconds: to read for, or until `DRIVE_BYTES` are read, which lie all over its files.
        room: bytes of memory for it.
    """
    extents = [entry.extent for entry in checkpoint.tensors.values() if entry.extent.length]
    if not extents or extents[0].file.startswith("hf://"):
        return None
    extents.sort(key=lambda extent: (extent.file, extent.offset))
    threads, chunk = SETTINGS[0]
    area = Area(min(room, threads * chunk))
    area.tensor.fill_(0)  # a first touch of memory would be counted as reading
    return measure_disk(extents, DRIVE_BYTES, area=area, most_seconds=seconds)


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
