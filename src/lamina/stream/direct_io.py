"""Files as the stream reads them: past the page cache, into aligned memory, compared with what they held before.

`O_DIRECT` moves bytes from the drive to their place without a copy and without filling the page cache,
which a memory cgroup would count against the budget. A file system that refuses it is read with ordinary
calls, and the cached pages are dropped behind the read.

Samples: copying tools write over a file and put its time back, and a network drive may give other bytes without a word.
To compare every byte of every pass would take a processor's whole time (SHA-256 and CRC-32 do 1 to 2 GB/s a core, which
is what a drive delivers), so a grid of pages is compared: a file whose weights are others differs in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sys
import threading
import zlib
from array import array
from collections.abc import Iterable
from typing import Protocol

import torch

from lamina.checkpoint import Fingerprint
from lamina.errors import ChangedError, CheckpointError, ReadError, TruncatedError
from lamina.plan.layout import ALIGNMENT, align
from lamina.retry import patiently

PAGES = 512  # of a file, at most: 0.3 ms of work for all of them
PAGE = 256  # bytes of each
FIRST = 8  # pages that are read when a model is loaded, of files of which nothing else is
LOOKED_AT = 128  # pages that are read again when something happened to a file
_UNKNOWN = -1


class Area:
    """Anonymous memory, aligned for direct reads, charged to the process only where it was touched.

    It lives as long as a tensor or a memoryview over it lives.

    Attributes:
        nbytes: its size, a multiple of `ALIGNMENT`.
        tensor: uint8 of shape (nbytes,), the same memory.
        view: writable memoryview, the same memory.
        address: of the first byte.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = align(max(nbytes, ALIGNMENT))
        # private: Python's own choice is memory that a forked child would share, and read its weights into
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, self.nbytes, **private)
        if hasattr(mmap, "MADV_HUGEPAGE") and self.nbytes >= 1 << 22:
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()


class File(Protocol):
    """One open file. The stream needs no more than this; tests give it a double that lives in memory."""

    path: str
    direct: bool

    def read_into(self, target: memoryview, offset: int, needed: int) -> None:
        """Fill `target` from byte `offset`; at least `needed` bytes must arrive.

        Raises:
            TruncatedError: the file ends before them.
            ReadError: the operating system refused.
        """

    def fingerprint(self) -> Fingerprint:
        """Size and times of the open file, not of the file that now has its name."""

    def close(self) -> None:
        """Close it; nothing happens where it is closed."""


class PosixFile:
    """A file read with `preadv`, directly where possible. Safe to use from many threads."""

    def __init__(self, path: str, *, direct: bool = True) -> None:
        self.path = path
        self.direct = False
        self._fd = -1
        try:
            if direct and hasattr(os, "O_DIRECT"):
                self.direct = self._open_direct()
            if not self.direct:
                self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as error:
            raise ChangedError(f"{path} is gone: it was there when the checkpoint was opened") from error
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        if direct and sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._fd, fcntl.F_NOCACHE, 1)

    def _open_direct(self) -> bool:
        """Open for direct reads and try one; False where the file system refuses either."""
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            with mmap.mmap(-1, ALIGNMENT) as probe:
                os.preadv(self._fd, [probe], 0)
        except FileNotFoundError:
            raise
        except OSError:
            self.close()
            return False
        return True

    def read_into(self, target: memoryview, offset: int, needed: int) -> None:
        """See `File.read_into`."""
        done = 0
        while done < needed:
            try:
                got = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise ReadError(
                    f"reading {len(target)} bytes at {offset} of {self.path} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise TruncatedError(
                    f"{self.path} ends at byte {offset + done}, its header promised {offset + needed}: "
                    f"it changed while it was read, fetch it again"
                )
            done += got
            if done < needed and self.direct and done % ALIGNMENT:
                done -= done % ALIGNMENT  # a direct read continues at an aligned byte
                if got < ALIGNMENT:
                    raise TruncatedError(f"{self.path} ends at byte {offset + done + got}, wanted {offset + needed}")
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, needed, os.POSIX_FADV_DONTNEED)

    def fingerprint(self) -> Fingerprint:
        """See `File.fingerprint`."""
        return Fingerprint.of(os.fstat(self._fd))

    def close(self) -> None:
        """See `File.close`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PlainFile:
    """A file read through a Python file object under a lock: where there is no `preadv` (Windows)."""

    direct = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error

    def read_into(self, target: memoryview, offset: int, needed: int) -> None:
        """See `File.read_into`."""
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < needed:
                try:
                    got = self._file.readinto(target[done:])
                except OSError as error:
                    raise ReadError(f"reading {self.path} at {offset + done} failed: {error.strerror}") from error
                if not got:
                    raise TruncatedError(f"{self.path} ends at byte {offset + done}, wanted {offset + needed}")
                done += got

    def fingerprint(self) -> Fingerprint:
        """See `File.fingerprint`."""
        return Fingerprint.of(os.fstat(self._file.fileno()))

    def close(self) -> None:
        """See `File.close`."""
        self._file.close()


def open_file(path: str) -> File:
    """Open `path` in the best way this system has."""
    return PosixFile(path) if hasattr(os, "preadv") else PlainFile(path)


class Samples:
    """The pages of one file.

    Args:
        path: how errors call it.
        size: bytes of it.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size
        self._step = max(align(size // PAGES), ALIGNMENT)
        self._sums = array("q", [_UNKNOWN]) * (size // self._step + 1)

    def compare(self, offset: int, data: memoryview) -> None:
        """Look at what was read from byte `offset` on: remember what is new, compare the rest.

        Raises:
            ChangedError: a page is not what it was.
        """
        stop = offset + len(data)
        for number in range(-(-offset // self._step), min(-(-stop // self._step), len(self._sums))):
            begin = number * self._step - offset
            if begin + PAGE > len(data):
                return
            found = zlib.crc32(data[begin : begin + PAGE])
            if self._sums[number] == _UNKNOWN:
                self._sums[number] = found
            elif self._sums[number] != found:
                raise ChangedError(
                    f"{self.path} was written to since it was opened (byte {number * self._step} and what follows is "
                    f"not what was read before): load the model again"
                )

    def begin(self, file: File) -> None:
        """Read a few pages, unless some were read before. Raises what `look` raises."""
        if all(found == _UNKNOWN for found in self._sums):
            self._read(file, range(0, len(self._sums), -(-len(self._sums) // FIRST)))

    def look(self, file: File) -> bool:
        """Read some of the pages again that were read before; False where there were none.

        Raises:
            ChangedError: one is not what it was.
            ReadError, TruncatedError: see `File.read_into`.
        """
        known = [number for number, found in enumerate(self._sums) if found != _UNKNOWN]
        self._read(file, known[:: -(-len(known) // LOOKED_AT) or 1])
        return bool(known)

    def _read(self, file: File, numbers: Iterable[int]) -> None:
        page = Area(ALIGNMENT)
        for number in numbers:
            offset = number * self._step
            if offset + PAGE <= self.size:
                target = page.view[: ALIGNMENT if file.direct else PAGE]
                patiently(functools.partial(file.read_into, target, offset, PAGE))
                self.compare(offset, page.view[:PAGE])
