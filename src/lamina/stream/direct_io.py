"""Reading files past the page cache, where the file system allows it.

`O_DIRECT` moves bytes from the drive to their place without a copy and without filling the page cache,
which a memory cgroup would count against the budget. A file system that refuses it is read with ordinary
calls, and the cached pages are dropped behind the read.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Protocol

from lamina.checkpoint import Fingerprint
from lamina.errors import ChangedError, CheckpointError, ReadError, TruncatedError
from lamina.plan.layout import ALIGNMENT


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
        """Size and times of the open file, whatever its name leads to by now."""

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
        import mmap

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
                done -= done % ALIGNMENT  # a direct read goes on from an aligned byte
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
