"""What the C library does with memory that is freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COUNT = """
import ctypes
from lamina.host import LARGE_BLOCK, return_large_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


libc.mallinfo2.restype = Info


def mapped(nbytes):
    before = libc.mallinfo2().hblks
    libc.malloc(nbytes)
    return libc.mallinfo2().hblks - before


libc.free(libc.malloc(24 << 20))  # by itself glibc maps nothing below 24 MB from here on
alone = mapped(2 * LARGE_BLOCK)
return_large_blocks()
print(alone, mapped(2 * LARGE_BLOCK), mapped(LARGE_BLOCK // 2))
"""


def _mapped(**environment: str) -> list[str]:
    plain = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _COUNT], env=plain | environment, capture_output=True, text=True)
    if "mallinfo2" in done.stderr:
        pytest.skip("no glibc of 2.33 or newer")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_large_blocks_are_mapped_each_on_its_own() -> None:
    """And so go back to the system when they are freed; small ones stay with the heap."""
    assert _mapped() == ["0", "1", "0"]


def test_what_the_user_set_stays() -> None:
    assert _mapped(MALLOC_MMAP_THRESHOLD_="67108864") == ["0", "0", "0"]
