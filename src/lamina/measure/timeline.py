"""Spans of time: whose they are, what the drive did meanwhile, and the same as a file that Perfetto opens.

Everything here is arithmetic on nanoseconds of one clock; who records them is another matter (`profile.py`).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lamina.stream.observe import COPY, LAMINA, THROUGH, UNPACK, WAIT

STEP, PASS, LAYER, OP = "step", "pass", "layer", "op"  # a decode step, one forward, a decoder layer, a call of torch
MODEL, COMPUTE, BETWEEN = "model", "compute", "between"  # owners: the model's Python, torch, what surrounds the passes
OWN = frozenset({WAIT, UNPACK, COPY, LAMINA})  # all that happens within is theirs
MOST_EVENTS = 200_000  # in a file: what Perfetto still opens at once
STEPS_OF_DROPPING = 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000  # ns
PROCESS, MODEL_TRACK = 1, 1


class Span(NamedTuple):
    """Something that the thread of the model did, in nanoseconds."""

    kind: str
    name: str
    begin: int
    end: int


class ReadSpan(NamedTuple):
    """One read of one reader thread, in nanoseconds and bytes."""

    thread: str
    file: str
    offset: int
    nbytes: int
    begin: int
    end: int


class Drive(NamedTuple):
    """What the drive did in some steps, all of them together; nanoseconds and bytes.

    Attributes:
        wall: how long they took.
        busy: at least one read was under way.
        in_flight: of the reads under way, each for itself.
        full: no read was under way, because what is read ahead had no room.
        nbytes: that arrived, a read that only partly falls into a step counted in proportion.
    """

    wall: int
    busy: int
    in_flight: int
    full: int
    nbytes: float


def nested(spans: Iterable[Span]) -> list[Span]:
    """The spans in order of their begin, any two of them apart or one within the other.

    They come from two clocks that agree to a few microseconds, so an operation may seem to begin before the call that
    precedes it has ended: the smaller part of such a span is cut off.
    """
    out: list[Span] = []
    ends: list[int] = []
    last = 0
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        begin, end = max(span.begin, last), span.end
        while ends and ends[-1] <= begin:
            ends.pop()
        if ends and end > ends[-1]:
            if ends[-1] - begin >= end - ends[-1]:
                end = ends[-1]
            else:
                begin = ends[-1]
                while ends and ends[-1] <= begin:
                    ends.pop()
                end = min([end, *ends[-1:]])
        end, last = max(begin, end), begin
        out.append(span._replace(begin=begin, end=end))
        ends.append(end)
    return out


def owners(spans: Sequence[Span], begin: int, end: int) -> Counter[str]:
    """Nanoseconds between `begin` and `end` by owner; they add up to `end - begin`.

    Args:
        spans: nested, in order, all of them between `begin` and `end`.
    """
    sums: Counter[str] = Counter()
    stack: list[tuple[int, str]] = [(end, BETWEEN)]
    at = begin
    for span in spans:
        while len(stack) > 1 and stack[-1][0] <= span.begin:
            sums[stack[-1][1]] += stack[-1][0] - at
            at = stack.pop()[0]
        sums[stack[-1][1]] += span.begin - at
        at = span.begin
        stack.append((span.end, _owner(stack[-1][1], span.kind)))
    for until, owner in reversed(stack):
        sums[owner] += until - at
        at = until
    return sums


def by_call(spans: Sequence[Span]) -> Counter[str]:
    """Nanoseconds of Lamina's Python by the call they were spent in, without what was called from there.

    Args:
        spans: nested, in order; a name is the call, followed by what it was for.
    """
    sums: Counter[str] = Counter()
    stack: list[Span] = []
    for span in spans:
        while stack and stack[-1].end <= span.begin:
            stack.pop()
        if stack and stack[-1].kind == LAMINA:
            sums[stack[-1].name.split(" ", 1)[0]] -= span.end - span.begin
        if span.kind == LAMINA:
            sums[span.name.split(" ", 1)[0]] += span.end - span.begin
        stack.append(span)
    return sums


def _owner(outer: str, kind: str) -> str:
    """Whose time a span of `kind` is within what `outer` owns."""
    if kind in OWN:
        return kind
    if kind == PASS:
        return MODEL
    if outer in (MODEL, THROUGH) and kind in (OP, THROUGH):
        return COMPUTE if kind == OP else THROUGH
    return outer


def drive_of(reads: Iterable[ReadSpan], full: Iterable[tuple[int, int]], steps: Sequence[tuple[int, int]]) -> Drive:
    """What the drive did in `steps`.

    Args:
        full: when what is read ahead had no room, from and until.
        steps: from and until; apart from each other.
    """
    reads, full = list(reads), list(full)
    wall = busy = in_flight = idle_full = 0
    nbytes = 0.0
    for begin, end in steps:
        edges: list[tuple[int, int, int]] = [(end, 0, 0)]
        for read in reads:
            first, last = max(read.begin, begin), min(read.end, end)
            if first < last:
                edges += [(first, 1, 0), (last, -1, 0)]
                nbytes += read.nbytes * (last - first) / (read.end - read.begin)
        for since, until in full:
            first, last = max(since, begin), min(until, end)
            if first < last:
                edges += [(first, 0, 1), (last, 0, -1)]
        at, flying, filled = begin, 0, 0
        for time, more, fuller in sorted(edges):
            busy += time - at if flying else 0
            in_flight += flying * (time - at)
            idle_full += time - at if filled and not flying else 0
            at, flying, filled = time, flying + more, filled + fuller
        wall += end - begin
    return Drive(wall, busy, in_flight, idle_full, nbytes)


class ChromeTrace(NamedTuple):
    """A trace as Perfetto reads it.

    Attributes:
        record: what the file holds.
        dropped: operations that were left out.
        dropped_below: those shorter than so many nanoseconds.
    """

    record: dict[str, Any]
    dropped: int
    dropped_below: int


def chrome_trace(
    title: str,
    spans: Sequence[Span],
    reads: Sequence[ReadSpan],
    levels: Sequence[tuple[int, int]],
    most_events: int = MOST_EVENTS,
) -> ChromeTrace:
    """Chrome's trace-event format: a track for the model, one for each reader thread, counters for ring and reads.

    Args:
        title: name of the process.
        spans: nested.
        levels: bytes of the ring that are taken, from a moment on.
        most_events: short operations are left out, as far as it takes to keep below that many.
    """
    kept, below = _longest(spans, most_events - 3 * len(reads) - len(levels))
    dropped = len(spans) - len(kept)
    starts = [*(span.begin for span in kept), *(read.begin for read in reads), *(at for at, _ in levels)]
    zero = min(starts, default=0)
    threads = sorted({read.thread for read in reads}, key=lambda name: (len(name), name))
    tracks = {name: MODEL_TRACK + 1 + number for number, name in enumerate(threads)}
    events = [_named("process_name", title)]
    for name, track in {"model": MODEL_TRACK, **tracks}.items():
        events += [_named("thread_name", name, track), _sorted(track)]
    events += [_slice(span.name, span.kind, MODEL_TRACK, span.begin - zero, span.end - zero) for span in kept]
    events += [_read_slice(read, tracks[read.thread], zero) for read in reads]
    events += [_counted("ring", "bytes", at - zero, level) for at, level in levels]
    events += [_counted("reads in flight", "reads", at - zero, flying) for at, flying in _flying(reads)]
    facts = {"made by": "lamina", "dropped operations": dropped, "dropped below microseconds": below / 1000}
    return ChromeTrace(
        {"otherData": facts, "displayTimeUnit": "ms", "traceEvents": events}, dropped, below if dropped else 0
    )


def _longest(spans: Sequence[Span], room: int) -> tuple[list[Span], int]:
    """Of spans, all but the shortest operations, so that `room` holds them; operations left out are shorter than so."""
    below = 0
    kept = list(spans)
    for step in STEPS_OF_DROPPING:
        if len(kept) <= room:
            break
        below = step
        kept = [span for span in kept if span.kind != OP or span.end - span.begin >= below]
    return kept, below


def _flying(reads: Sequence[ReadSpan]) -> Iterator[tuple[int, int]]:
    """How many reads are under way, from a moment on."""
    edges = sorted([(read.begin, 1) for read in reads] + [(read.end, -1) for read in reads])
    return zip((at for at, _ in edges), itertools.accumulate(more for _, more in edges), strict=True)


def _read_slice(read: ReadSpan, track: int, zero: int) -> dict[str, Any]:
    facts = {"file": read.file, "offset": read.offset, "bytes": read.nbytes}
    return _slice(f"read {os.path.basename(read.file)}", "read", track, read.begin - zero, read.end - zero, facts)


def _slice(name: str, kind: str, track: int, begin: int, end: int, args: Any = None) -> dict[str, Any]:
    event = {"name": name, "cat": kind, "ph": "X", "ts": begin / 1000, "dur": (end - begin) / 1000}
    return {**event, "pid": PROCESS, "tid": track, **({"args": args} if args else {})}


def _counted(name: str, unit: str, at: int, value: int) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": at / 1000, "pid": PROCESS, "args": {unit: value}}


def _named(what: str, name: str, track: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": PROCESS, "tid": track, "args": {"name": name}}


def _sorted(track: int) -> dict[str, Any]:
    return {"name": "thread_sort_index", "ph": "M", "pid": PROCESS, "tid": track, "args": {"sort_index": track}}
