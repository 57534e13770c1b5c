"""Reader threads over real files, and over doubles where a real file cannot be made to fail on time."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.schedules import Checkpoint, Disk
from helpers.walker import watchdog
from lamina.errors import ChangedError, CheckpointError, ClosedError, LaminaError, ReadError, TruncatedError
from lamina.plan.layout import ALIGNMENT, Read, align
from lamina.stream.direct_io import Area, File, PlainFile, PosixFile
from lamina.stream.readers import Readers, Ticket

SIZE = 3_000_001
OPENERS: dict[str, Callable[[str], File]] = {
    "direct": PosixFile,
    "buffered": lambda path: PosixFile(path, direct=False),
    "plain": PlainFile,
}


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    """Models that other files have dropped are gone, and their threads with them."""
    gc.collect()


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog():
        yield


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "weights"
    file.write_bytes(content)
    return str(file)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lamina-reader")]


def descriptors(path: str) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(path) for fd in os.listdir("/proc/self/fd"))


def whole(path: str, length: int = SIZE) -> Read:
    return Read(path, 0, align(length), 0, length, True)


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("chunk", [4096, 65536, 8 << 20])
def test_a_file_is_read_to_its_last_byte(how: str, chunk: int, path: str, content: bytes) -> None:
    readers = Readers(4, chunk, OPENERS[how])
    area = Area(SIZE)
    readers.read([whole(path)], area)
    assert bytes(area.view[:SIZE]) == content
    assert readers.bytes_read == SIZE
    readers.close()
    assert not threads() and not descriptors(path)


@pytest.mark.parametrize("how", OPENERS)
def test_reads_that_fit_no_alignment(how: str, path: str, content: bytes) -> None:
    rng = random.Random(3)
    readers = Readers(4, 16384, OPENERS[how])
    area = Area(SIZE)
    reads, at = [], 0
    for _ in range(60):
        length = rng.choice((1, 7, 100, 4096, 5000, 60_000))
        offset = rng.choice((0, 1, 4095, 4096, SIZE - length, rng.randrange(SIZE - length)))
        reads.append(Read(path, offset, length, at, length, False))
        at += length
    readers.read(reads, area)
    for read in reads:
        assert bytes(area.view[read.at : read.at + read.length]) == content[read.offset : read.offset + read.length]
    readers.close()


@pytest.mark.parametrize("at", [0, ALIGNMENT, 100])
def test_a_place_in_the_area_is_kept(at: int, path: str, content: bytes) -> None:
    readers = Readers(2, 8192)
    area = Area(SIZE + 2 * ALIGNMENT)
    area.tensor.fill_(9)
    readers.read([Read(path, 8192, 40_960, ALIGNMENT, 40_000, True)], area, at)
    begin = at + ALIGNMENT
    assert bytes(area.view[begin : begin + 40_000]) == content[8192:48_192]
    assert set(area.view[:begin]) == {9} and set(area.view[begin + 40_960 :]) == {9}
    readers.close()


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("end", [0, 1, 4096, 1_000_000, 1_003_520, SIZE - 1])
def test_a_file_that_was_cut_while_it_was_open(how: str, end: int, path: str, content: bytes) -> None:
    readers = Readers(4, 65536, OPENERS[how])
    area = Area(SIZE)
    readers.read([whole(path)], area)
    os.truncate(path, end)
    with pytest.raises(TruncatedError, match="ends at byte"):
        readers.read([whole(path)], area)
    if end > 8192:
        readers.read([Read(path, 0, 8192, 0, 8192, True)], area)
        with pytest.raises(TruncatedError):
            readers.read([whole(path)], area)
        readers.settle()
    Path(path).unlink()
    Path(path).write_bytes(content)
    readers.read([whole(path)], area)  # a failed file is opened anew
    assert bytes(area.view[:SIZE]) == content
    readers.close()
    assert not descriptors(path)


def test_a_file_that_went_away(path: str) -> None:
    readers = Readers(2)
    Path(path).unlink()
    with pytest.raises(ChangedError, match="is gone"):
        readers.read([whole(path)], Area(SIZE))
    Path(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot open"):
        readers.read([whole(f"{path}/below a file")], Area(SIZE))
    readers.close()


def test_what_the_system_refuses_comes_as_a_read_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = Readers(2, opener=lambda name: PosixFile(name, direct=False))
    area = Area(SIZE)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> int:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "preadv", refuse)
        with pytest.raises(ReadError, match=r"failed: Input/output error"):
            readers.read([whole(path)], area)
    readers.read([whole(path)], area)
    readers.close()


def test_a_file_system_that_refuses_direct_reads(path: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def no_direct(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain(name, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    file = PosixFile(path)
    assert not file.direct
    area = Area(SIZE)
    file.read_into(area.view[:SIZE], 0, SIZE)
    assert bytes(area.view[:SIZE]) == content
    file.close()
    file.close()
    assert not descriptors(path)


def test_a_file_system_that_opens_directly_but_does_not_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = os.preadv, []

    def refuse_first(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(22, "Invalid argument")
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refuse_first)
    file = PosixFile(path)
    assert not file.direct and descriptors(path) == 1
    file.close()


@pytest.mark.parametrize("steps", [[1000], [4096, 100, 5000], [SIZE]])
@pytest.mark.parametrize("direct", [False, True])
def test_short_reads_are_gone_on_with(steps: list[int], direct: bool, path: str, content: bytes,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plain, turn = os.preadv, [0]

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        turn[0] += 1
        most = max(steps[turn[0] % len(steps)], 4096 if direct else 1)
        data = os.pread(plain_fd, min(most, len(buffers[0])), offset)
        buffers[0][: len(data)] = data
        return len(data)

    file = PosixFile(path, direct=direct)
    plain_fd = os.open(path, os.O_RDONLY)
    area = Area(SIZE)
    monkeypatch.setattr(os, "preadv", short)
    file.read_into(area.view[: align(200_000)], 0, 200_000)
    monkeypatch.setattr(os, "preadv", plain)
    assert bytes(area.view[:200_000]) == content[:200_000]
    os.close(plain_fd)
    file.close()


def rig(**more: object) -> tuple[Disk, Checkpoint]:
    checkpoint = Checkpoint()
    checkpoint.extent(1 << 20)
    return Disk(checkpoint, **more), checkpoint  # type: ignore[arg-type]


def test_an_urgent_read_overtakes() -> None:
    disk, _ = rig()
    order: list[int] = []
    disk.gate.clear()

    class Noting:
        path, direct = "a", False

        def read_into(self, target: memoryview, offset: int, needed: int) -> None:
            disk.gate.wait(30)
            order.append(offset)

        def close(self) -> None: ...

    readers = Readers(1, 4096, lambda path: Noting())
    area = Area(1 << 20)
    slow = readers.submit([Read("a", 0, 10 * 4096, 0, 10 * 4096, True)], area)
    urgent = readers.submit([Read("a", 1 << 19, 4096, 0, 4096, True)], area, urgent=True)
    disk.gate.set()
    readers.wait(urgent)
    readers.wait(slow)
    assert order.index(1 << 19) <= 1
    readers.close()


@pytest.mark.parametrize("threads_waiting", [1, 4])
def test_close_wakes_whoever_waits(threads_waiting: int) -> None:
    for _ in range(20):
        disk, _ = rig()
        disk.gate.clear()
        readers = Readers(3, 4096, disk.open)
        area = Area(1 << 20)
        raised: list[BaseException] = []

        def wait(readers: Readers = readers, area: Area = area, raised: list[BaseException] = raised) -> None:
            with pytest.raises(ClosedError) as caught:
                readers.read([whole("a", 1 << 20)], area)
            raised.append(caught.value)

        waiting = [threading.Thread(target=wait) for _ in range(threads_waiting)]
        for thread in waiting:
            thread.start()
        while not readers._shared.reading:
            time.sleep(0)
        closers = [threading.Thread(target=readers.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        while not readers.closed:
            time.sleep(0)
        disk.gate.set()
        for thread in (*waiting, *closers):
            thread.join()
        assert [type(error) for error in raised] == [ClosedError] * threads_waiting
        assert not threads()
        assert all(file.closed for file in disk.opened)


def test_a_read_that_close_overtook_is_never_taken_for_done() -> None:
    disk, checkpoint = rig()
    for _ in range(30):
        disk.gate.clear()
        readers = Readers(2, 4096, disk.open)
        area = Area(1 << 20)
        ticket = readers.submit([whole("a", 1 << 20)], area)
        closer = threading.Thread(target=readers.close)
        closer.start()
        disk.gate.set()
        closer.join()
        try:
            readers.wait(ticket)
        except ClosedError:
            continue
        assert bytes(area.view) == checkpoint.content("a")


def test_closed_readers_refuse_and_close_again() -> None:
    disk, _ = rig()
    readers = Readers(2, opener=disk.open)
    readers.close()
    readers.close()
    with pytest.raises(ClosedError):
        readers.submit([whole("a", 4096)], Area(4096))
    readers.settle()
    readers.settled(Ticket(left=1))
    assert not threads()


def test_close_and_submit_at_once_leave_no_thread() -> None:
    for _ in range(50):
        disk, _ = rig()
        readers = Readers(2, 4096, disk.open)
        area = Area(1 << 20)

        def submit(readers: Readers = readers, area: Area = area) -> None:
            try:
                for _ in range(50):
                    readers.submit([whole("a", 4096)], area)
            except ClosedError:
                pass

        thread = threading.Thread(target=submit)
        thread.start()
        readers.close()
        thread.join()
        for name in threads():
            next(t for t in threading.enumerate() if t.name == name).join(5)
        assert not threads()


def test_the_last_reference_dropped_by_a_reader_thread_does_not_hang() -> None:
    """The garbage collector may run `close` in a reader thread, which cannot wait for itself."""
    disk, _ = rig()
    readers = Readers(2, 4096, disk.open)
    plain = disk.open

    def closing(path: str) -> object:
        readers.close()
        return plain(path)

    readers._shared.opener = closing  # type: ignore[assignment]
    with pytest.raises(LaminaError):
        readers.read([whole("a", 1 << 20)], Area(1 << 20))
    readers.close()
    assert not threads()
    assert all(file.closed for file in disk.opened)


def test_many_threads_read_at_once(path: str, content: bytes) -> None:
    readers = Readers(8, 16384)
    failed: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        area = Area(70_000)
        for _ in range(40):
            length = rng.randint(1, 60_000)
            offset = rng.randrange(SIZE - length)
            readers.read([Read(path, offset, length, 64, length, False)], area)
            if bytes(area.view[64 : 64 + length]) != content[offset : offset + length]:
                failed.append((offset, length))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
    readers.close()


def test_nothing_begins_while_paused() -> None:
    disk, _ = rig()
    readers = Readers(3, 4096, disk.open)
    readers.pause()
    readers.pause()
    ticket = readers.submit([whole("a", 1 << 20)], Area(1 << 20))
    readers.resume()
    time.sleep(0.02)
    assert disk.reads == 0 and not ticket.done
    readers.resume()
    readers.wait(ticket)
    readers.resume()  # once too often: made while another thread forked
    readers.read([whole("a", 4096)], Area(4096))
    readers.pause()
    readers.close()
    assert not threads()


def test_settle_waits_for_all_and_raises_nothing() -> None:
    disk, _ = rig(slow=0.001)
    readers = Readers(3, 4096, disk.open)
    disk.broken = ReadError("broken")
    tickets = [readers.submit([whole("a", 1 << 16)], Area(1 << 16)) for _ in range(5)]
    readers.settle()
    assert all(ticket.done and ticket.error is disk.broken for ticket in tickets)
    assert all(file.closed for file in disk.opened)
    disk.broken = None
    readers.read([whole("a", 1 << 16)], Area(1 << 16))
    readers.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reads_on_its_own(path: str, content: bytes) -> None:
    readers = Readers(4, 4096)
    area = Area(SIZE)
    ticket = readers.submit([whole(path)], area)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = Area(SIZE)
            readers.read([whole(path)], own)
            readers.close()
            code = 0 if bytes(own.view[:SIZE]) == content and readers.generation == 1 else 2
            area.view[:] = bytes(area.nbytes)  # the parent must not see it
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    readers.wait(ticket)
    assert bytes(area.view[:SIZE]) == content
    readers.close()


def test_importing_and_making_starts_no_thread() -> None:
    readers = Readers()
    assert not threads()
    readers.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_ctrl_c_at_any_moment_leaves_no_thread(path: str) -> None:
    """Also inside the start of a thread, which would stay half started for good."""
    rng = random.Random(5)
    area = Area(SIZE)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(400):
            readers = Readers(4, 65536)
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                    readers.read([whole(path)], area)
                    readers.close()
                    time.sleep(2e-3)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            readers.close()
            assert not threads() and not descriptors(path)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_no_thread_to_be_had_is_an_error_and_fewer_do_the_work(
    path: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, allowed = threading.Thread.start, [0]

    def start(thread: threading.Thread) -> None:
        if allowed[0] == 0:
            raise RuntimeError("can't start new thread")
        allowed[0] -= 1
        plain(thread)

    readers = Readers(4, 65536)
    area = Area(SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(ReadError, match=r"new thread.*limit"):
            readers.read([whole(path)], area)
        allowed[0] = 1
        readers.read([whole(path)], area)
        assert bytes(area.view[:SIZE]) == content
        assert len(threads()) == 1
    readers.close()
    assert not threads() and not descriptors(path)
