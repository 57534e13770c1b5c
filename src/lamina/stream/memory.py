"""Page-aligned memory that reads go into and tensors are views of."""

from __future__ import annotations

import contextlib
import mmap

import torch

from lamina.plan.layout import ALIGNMENT, align


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
