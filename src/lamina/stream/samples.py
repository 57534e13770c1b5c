"""What a few pages of each file held when they were first read: another file under the same size and time is found out.

Copying tools write over a file and put its time back, and a network drive may give other bytes without a word. To
compare every byte of every pass would take a processor's whole time (SHA-256 and CRC-32 do 1 to 2 GB/s a core, which
is what a drive delivers), so a grid of pages is compared: a file whose weights are others differs in all of them.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Iterable

from lamina.errors import ChangedError
from lamina.plan.layout import ALIGNMENT, align
from lamina.retry import patiently
from lamina.stream.direct_io import File
from lamina.stream.memory import Area

PAGES = 512  # of a file, at most: 0.3 ms of work for all of them
PAGE = 256  # bytes of each
FIRST = 8  # pages that are read when a model is loaded, of files of which nothing else is
LOOKED_AT = 128  # pages that are read again when something happened to a file

_UNKNOWN = -1


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
