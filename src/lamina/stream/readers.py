"""Threads that fill memory from files.

`preadv` releases the interpreter lock, so a few threads keep a drive's queue full. The threads know files
and places, no weights and no order: a `Ticket` counts the reads of one item and wakes the threads that wait for it.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec

from lamina.checkpoint import Fingerprint
from lamina.errors import ChangedError, CheckpointError, ClosedError, ReadError, TruncatedError
from lamina.host import watching_forks
from lamina.plan.layout import ALIGNMENT, Read, align
from lamina.retry import PAUSES, is_transient
from lamina.stream.direct_io import Area, File, Samples, open_file
from lamina.stream.observe import WAIT, timed

THREADS = 8
CHUNK = 8 << 20  # bytes of one read
MIDDLE = 64 * 1024  # bytes from which on a read is worth dividing, so that only its edges are copied
BOUNCE = 1 << 20  # bytes of one read that has to be copied to its place


OnRead = Callable[[str, int, int, int], None]  # (file, offset, bytes, begin) of a read that has just ended


@dataclass(eq=False)
class Ticket:
    """Reads that belong together.

    Attributes:
        left: how many are still to come.
        error: of the first that failed.
        cancelled: some will never come.
    """

    left: int = 0
    error: BaseException | None = None
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """Whether no read is still to come."""
        return self.left == 0


class _Job(NamedTuple):  # made for every few megabytes: a dataclass would take three times as long
    file: str
    offset: int
    length: int
    needed: int
    area: Area
    at: int
    aligned: bool
    ticket: Ticket


@dataclass(eq=False)
class _Shared:
    """What the threads hold: no reference leads from here to the stream or the model."""

    opener: Callable[[str], File]
    fingerprints: Mapping[str, Fingerprint]
    jobs: deque[_Job] = field(default_factory=deque)
    urgent: deque[_Job] = field(default_factory=deque)
    lock: threading.RLock = field(default_factory=threading.RLock)  # entered as it is: Ctrl-C cannot leave it held
    files: dict[str, File] = field(default_factory=dict)
    buffered: set[str] = field(default_factory=set)  # folders whose files cannot be read past the page cache
    failed_files: list[File] = field(default_factory=list)  # another thread may still read them: closed later
    accepted: dict[str, Fingerprint] = field(default_factory=dict)  # of files that were looked at since
    samples: dict[str, Samples] = field(default_factory=dict)
    retries: int = 0  # reads that were tried once more
    hopeless: bool = False  # one was tried as often as it is worth: the others need not be
    threads: int = 0
    bytes_read: int = 0
    reading: int = 0
    paused: int = 0
    closed: bool = False
    on_read: OnRead | None = None

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)  # a ticket is done, or nothing is under way
        self.work = threading.Condition(self.lock)  # there may be something for a thread to do
        self.closing = threading.Event()

    def next_job(self) -> _Job | None:
        """The next read, urgent ones first, as soon as there is one; None when it is time to stop."""
        with self.lock:
            while not self.closed and (self.paused or not (self.urgent or self.jobs)):
                self.work.wait()
            if self.closed:
                return None
            self.reading += 1
            return self.urgent.popleft() if self.urgent else self.jobs.popleft()

    def file(self, path: str) -> File:
        with self.lock:
            if path not in self.files:
                file = self.opener(path)
                try:
                    self.check(file)
                except ChangedError:
                    file.close()
                    raise
                self.files[path] = file
                if not file.direct and hasattr(os, "O_DIRECT"):
                    self.buffered.add(os.path.dirname(path))
            return self.files[path]

    def check(self, file: File) -> None:
        """Raise ChangedError where an open file is not what its header was read from.

        One that was renamed, linked, or copied back has another ctime or inode, and so has one that was written over
        and given its old time: then what was read of it before is compared with what is there now.
        """
        first = self.fingerprints.get(file.path)
        if first is None:
            return
        known, now = self.accepted.get(file.path, first), file.fingerprint()
        if now == known:
            return
        known.verify(now, file.path)
        if known.touched(now) and not self.sampled(file.path, now.size).look(file) and known.place == now.place:
            raise ChangedError(
                f"{file.path} was written to, renamed, linked or had its rights changed before any of it was read, and "
                f"which of these is unknown: load the model again"
            )
        self.accepted[file.path] = now

    def sampled(self, path: str, size: int) -> Samples:
        """What is remembered of a file."""
        found = self.samples.get(path)
        return self.samples.setdefault(path, Samples(path, size)) if found is None else found

    def compare(self, job: _Job) -> None:
        """Raise ChangedError where what was read is not what was read there before."""
        known = self.fingerprints.get(job.file)
        if known is not None:
            self.sampled(job.file, known.size).compare(job.offset, job.area.view[job.at : job.at + job.needed])

    def waits(self, error: BaseException, tries: int) -> bool:
        """Whether a read that failed is worth trying again; waits before it is."""
        if tries >= len(PAUSES) or self.hopeless or not is_transient(error):
            self.hopeless = self.hopeless or tries >= len(PAUSES)
            return False
        self.closing.wait(PAUSES[tries])
        with self.lock:
            self.retries += not self.closed
            return not self.closed

    def forget_file(self, path: str) -> None:
        """After a failed read: the file is opened anew next time, for it may have been put back by then."""
        file = self.files.pop(path, None)
        if file is not None:
            self.failed_files.append(file)

    def fail(self, error: BaseException) -> None:
        """Let all that is queued end in `error`."""
        for job in (*self.urgent, *self.jobs):
            job.ticket.error, job.ticket.left = error, 0
        self.urgent.clear()
        self.jobs.clear()
        self.changed.notify_all()

    def close_files(self) -> None:
        for file in (*self.failed_files, *self.files.values()):
            file.close()
        self.failed_files.clear()
        self.files.clear()
        self.hopeless = False


P = ParamSpec("P")


def _interruptible(method: Callable[P, None]) -> Callable[P, None]:
    """Ctrl-C while a condition takes its lock again ends in a complaint about the lock: it is Ctrl-C all the same."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise

    return call


class Readers:
    """A pool of reader threads, started on first use.

    Args:
        threads: how many reads are in flight.
        chunk: bytes of one read.
        opener: gives a `File` for a path; tests pass one that reads from memory.
        fingerprints: what each file was when its header was read; another one is never read as this one.
    """

    def __init__(
        self,
        threads: int = THREADS,
        chunk: int = CHUNK,
        opener: Callable[[str], File] = open_file,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        self.threads, self.chunk = threads, align(chunk)
        self._shared = _Shared(opener, fingerprints or {})
        self._pool: list[threading.Thread] = []
        self.generation = 0  # of the process: a forked child's is one more
        _living.add(self)

    @property
    def changed(self) -> threading.Condition:
        """Notified whenever a ticket is done."""
        return self._shared.changed

    @property
    def bytes_read(self) -> int:
        """Bytes that reads gave so far."""
        return self._shared.bytes_read

    def look(self, path: str) -> None:
        """Open a file, if it is not open, and so see how it can be read."""
        self._shared.file(path)

    def remember(self) -> None:
        """Read a few pages of every file of which nothing was read yet, so that it is known again.

        Raises:
            ChangedError: a file is not what its header was read from.
        """
        for path, known in self._shared.fingerprints.items():
            file = self._shared.file(path)
            with contextlib.suppress(ReadError, TruncatedError):  # raised when it is needed
                self._shared.sampled(path, known.size).begin(file)

    @property
    def fallbacks(self) -> list[str]:
        """Second ways of reading that were taken so far, each with its reason."""
        return [
            f"files in {folder} are read through the page cache, and dropped from it after: its file system refuses "
            f"direct reads"
            for folder in sorted(self._shared.buffered)
        ]

    @property
    def retries(self) -> int:
        """Reads that the operating system refused and that were tried once more."""
        return self._shared.retries

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._shared.closed

    def tell(self, on_read: OnRead | None) -> None:
        """Have `on_read` called, in the thread that read, after every read from now on; None ends that."""
        with self._shared.lock:
            self._shared.on_read = on_read

    def submit(self, reads: Sequence[Read], area: Area, at: int = 0, *, urgent: bool = False) -> Ticket:
        """Start reading into `area`, each read at its own place after byte `at`; urgent ones overtake the others.

        Raises:
            ClosedError: the readers were closed.
        """
        shared = self._shared
        ticket = Ticket()
        jobs = [job for read in reads for job in self._chunks(read, area, at, ticket)]
        ticket.left = len(jobs)
        with shared.lock:
            if shared.closed:
                raise ClosedError("the stream is closed: load the model again")
            self._start()
            (shared.urgent if urgent else shared.jobs).extend(jobs)
            shared.work.notify(len(jobs))
        return ticket

    @_interruptible
    def wait(self, ticket: Ticket) -> None:
        """Block until every read of `ticket` is done, and raise what one of them raised."""
        if ticket.left:
            self._wait(ticket)
        if ticket.error is not None:
            raise ticket.error

    @timed(WAIT)
    def _wait(self, ticket: Ticket) -> None:
        with self._shared.lock:
            while ticket.left:
                if self._shared.closed:
                    raise ClosedError("the stream was closed while it was read")
                self.changed.wait()

    def read(self, reads: Sequence[Read], area: Area, at: int = 0) -> None:
        """Read now."""
        self.wait(self.submit(reads, area, at, urgent=True))

    def hurry(self, ticket: Ticket) -> None:
        """Let the reads of `ticket` that have not begun overtake the others."""
        shared = self._shared
        with shared.lock:
            shared.urgent.extend(job for job in shared.jobs if job.ticket is ticket)
            shared.jobs = deque(job for job in shared.jobs if job.ticket is not ticket)

    def cancel(self, ticket: Ticket) -> int:
        """Take back the reads of `ticket` that have not begun; their bytes."""
        shared = self._shared
        with shared.lock:
            ticket.cancelled = ticket.cancelled or ticket.left > 0
            taken = [job for job in shared.jobs if job.ticket is ticket]
            shared.jobs = deque(job for job in shared.jobs if job.ticket is not ticket)
            ticket.left -= len(taken)
            shared.changed.notify_all()
        return sum(job.needed for job in taken)

    @_interruptible
    @timed(WAIT)
    def settle(self) -> None:
        """Block until nothing is queued and nothing under way, read or failed."""
        shared = self._shared
        with shared.lock:
            shared.work.notify_all()  # an interrupted `submit` may not have come to it
            while (shared.jobs or shared.urgent or shared.reading) and not shared.closed:
                shared.changed.wait()
            if shared.failed_files and not shared.closed:
                shared.close_files()  # after a failure every file is opened anew: it may be another one by then

    @_interruptible
    def settled(self, ticket: Ticket) -> None:
        """Block until every read of `ticket` is done or failed."""
        if ticket.left:
            self._settled(ticket)

    @timed(WAIT)
    def _settled(self, ticket: Ticket) -> None:
        with self._shared.lock:
            while ticket.left and not self._shared.closed:
                self.changed.wait()

    def verify(self) -> None:
        """Look whether every open file is still what its header was read from.

        Raises:
            ChangedError: one was written to; nothing of it may be used.
        """
        with self._shared.lock:
            for path, file in list(self._shared.files.items()):
                try:
                    self._shared.check(file)
                except ChangedError:
                    self._shared.forget_file(path)  # opened anew next time: it may have been put back by then
                    raise

    def close(self) -> None:
        """Stop the threads; the last one closes the files. Safe to call twice, from any thread."""
        shared = self._shared
        with shared.lock:
            shared.closed = True
            shared.closing.set()
            shared.jobs.clear()
            shared.urgent.clear()
            shared.changed.notify_all()
            shared.work.notify_all()
        if threading.current_thread() in self._pool:
            return  # the garbage collector called from a reader: it cannot wait for itself
        for thread in self._pool:
            thread.join()

    def pause(self) -> None:
        """Let no read begin until `resume` was called as often, and wait until none is under way."""
        shared = self._shared
        with shared.lock:
            shared.paused += 1
            while shared.reading:
                shared.changed.wait()

    def resume(self) -> None:
        """Let reads begin again, once for each `pause`."""
        with self._shared.lock:
            self._shared.paused = max(self._shared.paused - 1, 0)  # 0: made while another thread forked
            self._shared.work.notify_all()

    def restart_in_child(self) -> None:
        """After a fork: the child has the memory but no threads; begin again with none and nothing queued."""
        old = self._shared
        old.close_files()
        self._shared = _Shared(
            old.opener,
            old.fingerprints,
            accepted=old.accepted,
            samples=old.samples,
            retries=old.retries,
            bytes_read=old.bytes_read,
            closed=old.closed,
        )
        self._pool = []
        self.generation += 1

    def _start(self) -> None:
        """Have the pool filled by a thread of its own: Ctrl-C inside `Thread.start` would leave one half started."""
        if len(self._pool) < self.threads:
            _thread.start_new_thread(_fill, (self._pool, self.threads, self._shared))

    def _chunks(self, read: Read, area: Area, at: int, ticket: Ticket) -> list[_Job]:
        """Even pieces of at most a chunk, so that no thread is left with a crumb."""
        aligned = read.aligned and (at + read.at) % ALIGNMENT == 0
        if not aligned and (at + read.at - read.offset) % ALIGNMENT == 0 and read.length > MIDDLE:
            return [job for part in _edges(read) for job in self._chunks(part, area, at, ticket)]
        limit = self.chunk if aligned else min(self.chunk, BOUNCE)
        count = max(-(-read.length // limit), 1)
        step = align(-(-read.length // count))
        jobs = []
        for begin in range(0, read.length, step):
            length = min(step, read.length - begin)
            needed = min(length, read.needed - begin)
            if needed > 0:
                place = at + read.at + begin
                jobs.append(_Job(read.file, read.offset + begin, length, needed, area, place, aligned, ticket))
        return jobs


def _edges(read: Read) -> list[Read]:
    """A read that lies in memory as it lies on disk: its middle is aligned, what is left at both ends is not."""
    stop = read.offset + read.length
    begin, end = align(read.offset), stop - stop % ALIGNMENT
    places = ((read.offset, begin, False), (begin, end, True), (end, stop, False))
    return [
        Read(read.file, low, high - low, read.at + low - read.offset, high - low, aligned)
        for low, high, aligned in places
        if low < high
    ]


def _fill(pool: list[threading.Thread], threads: int, shared: _Shared) -> None:
    with shared.lock:
        while len(pool) < threads and not shared.closed:
            thread = threading.Thread(target=_work, args=(shared,), name=f"lamina-reader-{len(pool)}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more: those that run do the work of all
                if not pool:
                    shared.fail(
                        ReadError(f"no thread to read with ({error}): raise the limit on threads, or close programs")
                    )
                return
            pool.append(thread)
            shared.threads += 1


def _work(shared: _Shared) -> None:
    bounce: list[Area] = []
    while (job := shared.next_job()) is not None:
        error: BaseException | None = None
        began = time.perf_counter_ns()
        try:
            _read_patiently(shared, job, bounce)
        except BaseException as raised:  # raised in the thread that waits
            error = raised
        with shared.lock:
            shared.reading -= 1
            if error is None:
                shared.bytes_read += job.needed
                shared.hopeless = False
                if shared.on_read is not None:
                    shared.on_read(job.file, job.offset, job.needed, began)
            else:
                shared.forget_file(job.file)
                job.ticket.error = job.ticket.error or error
            job.ticket.left -= 1
            if job.ticket.left == 0 or not shared.reading:
                shared.changed.notify_all()
        del job, error  # they keep memory alive that others use
    with shared.lock:
        shared.threads -= 1
        if not shared.threads:
            shared.close_files()


def _read_patiently(shared: _Shared, job: _Job, bounce: list[Area]) -> None:
    tries = 0
    while True:
        try:
            _read(shared.file(job.file), job, bounce)
            break
        except (ReadError, CheckpointError) as error:
            if not shared.waits(error, tries):
                raise
            tries += 1
            if tries > 1:
                with shared.lock:
                    shared.forget_file(job.file)  # a network drive may be there again, under another handle
    shared.compare(job)


def _read(file: File, job: _Job, bounce: list[Area]) -> None:
    if not file.direct:
        file.read_into(job.area.view[job.at : job.at + job.needed], job.offset, job.needed)
    elif job.aligned:
        file.read_into(job.area.view[job.at : job.at + job.length], job.offset, job.needed)
    else:
        if not bounce:
            bounce.append(Area(BOUNCE + 2 * ALIGNMENT))
        skip = job.offset % ALIGNMENT
        span = align(skip + job.needed)
        file.read_into(bounce[0].view[:span], job.offset - skip, skip + job.needed)
        ctypes.memmove(job.area.address + job.at, bounce[0].address + skip, job.needed)


# a fork copies memory but no threads: no read may be under way in it, and the child starts afresh
_living = watching_forks(before=Readers.pause, after_in_parent=Readers.resume, after_in_child=Readers.restart_in_child)
