"""Files that are either whole or not there: written beside their place, flushed to the drive, then renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from lamina.caller import another_place
from lamina.errors import CheckpointError, WriteError
from lamina.retry import patiently
from lamina.sizes import format_size

PART = ".part"
FLUSHED_BYTES = 32 << 20  # after so many the drive is asked to begin, and the page cache to let go


@contextlib.contextmanager
def refusals(path: str) -> Iterator[None]:
    """Within this block a write that the operating system refuses is a `WriteError` in one line."""
    try:
        yield
    except OSError as error:
        what, advice = error.strerror or str(error), ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what += "; what is finished is kept: make room and run it again, it continues where it stopped"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = another_place()
        raise WriteError(f"cannot write {path}: {what}", advice) from error


class NewFile:
    """A file on its way. Used with `with`: without `commit` nothing is left of it.

    Attributes:
        nbytes: written so far.
    """

    def __init__(
        self, folder: str, name: str, refusing: Callable[[str], AbstractContextManager[object]] = refusals
    ) -> None:
        """A file of this name in a folder; `refusing` says what becomes of errors of the operating system."""
        self.path, self._refusing = os.path.join(folder, name), refusing
        self.nbytes = 0
        self._part = os.path.join(folder, f".{name}.{secrets.token_hex(8)}{PART}")
        self._digest = hashlib.sha256()
        self._fd = -1
        self._flushed = 0

    def __enter__(self) -> NewFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        with self._refusing(self.path):
            self._fd = os.open(self._part, flags, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)

    def write(self, data: Any) -> None:
        """Append bytes.

        Raises:
            WriteError: the operating system refused.
        """
        view = memoryview(data)
        self._digest.update(view)
        with self._refusing(self.path):
            while view.nbytes:
                view = view[os.write(self._fd, view) :]
        self.nbytes += memoryview(data).nbytes
        if self.nbytes - self._flushed >= FLUSHED_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, self.nbytes, os.POSIX_FADV_DONTNEED)
            self._flushed = self.nbytes

    def commit(self) -> str:
        """Give the file its name once its bytes are on the drive; their SHA-256."""
        with self._refusing(self.path):
            os.fsync(self._fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._close()
            os.replace(self._part, self.path)
            flush_folder(os.path.dirname(self.path))
        return self._digest.hexdigest()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def write_whole(folder: str, name: str, data: bytes) -> str:
    """Write a small file at once; its SHA-256. Raises `WriteError`."""
    with NewFile(folder, name) as out:
        out.write(data)
        return out.commit()


def flush_folder(folder: str) -> None:
    """Make names that were given or taken away in a folder last."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_part(name: str) -> bool:
    """Whether a file of this name is one that is not finished."""
    return name.startswith(".") and name.endswith(PART)


def remove_parts(folder: str) -> None:
    """Remove what an earlier process left unfinished."""
    for name in os.listdir(folder):
        if is_part(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def checksum(path: str, seen: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Bytes of a file and their SHA-256, read from the drive rather than from the page cache.

    Args:
        path: the file.
        seen: called with the number of bytes of each piece that was read.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest, total, buffer = hashlib.sha256(), 0, bytearray(8 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while got := patiently(functools.partial(file.readinto, buffer)):
                digest.update(memoryview(buffer)[:got])
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), total, got, os.POSIX_FADV_DONTNEED)
                total += got
                if seen is not None:
                    seen(got)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return total, digest.hexdigest()


def check_room(folder: str, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        WriteError: fewer than `needed` bytes are free.
    """
    place = folder
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise WriteError(
            f"{folder} needs {format_size(needed)} more, {format_size(free)} are free there",
            f"make room, or {another_place()}",
        )
