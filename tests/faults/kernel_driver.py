"""Calls a library of the kernels with random shapes and hostile bytes: python kernel_driver.py LIBRARY SEED ROUNDS.

Run by test_kernels_sanitized.py, in a process of its own and without torch, so that a sanitizer can be loaded before
everything else. What a panel holds may be anything; its size is right, for that is what the codecs check beforehand.
Each buffer has exactly the bytes that the kernel may touch. Prints the round before it is done.
"""

from __future__ import annotations

import ctypes
import math
import random
import struct
import sys
from typing import Any

BF16, F16, F32 = 0, 1, 2
ITEM = {BF16: 2, F16: 2, F32: 4}
# number in a GGUF file -> elements and bytes of a block
GGUF = {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144),
        13: (256, 176), 14: (256, 210), 20: (32, 18), 23: (256, 136), 39: (32, 17), 16: (256, 66), 17: (256, 74),
        22: (256, 82), 18: (256, 98), 21: (256, 110), 19: (256, 50), 29: (256, 56)}  # fmt: skip
HALVES = [0, 1, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F, 0x8000, 0x0080, 0x7C00, 0xFC00, 0x7BFF, 0x7E00, 0x3F80, 0xFFFF]
FLOATS = [0.0, -0.0, 1e-45, 1e-38, 1e-33, 1.0, 1.0000001, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 65520.0]


class Driver:
    """Random calls of one library."""

    def __init__(self, library: ctypes.CDLL, seed: int) -> None:
        self.library, self.chance = library, random.Random(seed)
        self.keep: list[Any] = []

    def place(self, content: bytes, alignment: int) -> ctypes.c_void_p:
        """The address of a copy that ends where its buffer ends."""
        slack = self.chance.randrange(0, 64, alignment)
        buffer = (ctypes.c_char * (slack + len(content))).from_buffer_copy(bytes(slack) + content)
        self.keep.append(buffer)
        return ctypes.c_void_p(ctypes.addressof(buffer) + slack)

    def noise(self, count: int) -> bytes:
        """Bytes of a panel: random, all the same, or random with numbers in between that are none."""
        kind = self.chance.randrange(4)
        if kind == 0:
            return bytes([self.chance.choice([0, 255, 127, 128, 3])]) * count
        noise = bytearray(self.chance.randbytes(count))
        if kind == 1:
            for _ in range(1 + count // 64):
                at = self.chance.randrange(max(count - 2, 1))
                noise[at : at + 2] = struct.pack("<H", self.chance.choice(HALVES))[: count - at]
        return bytes(noise[:count])

    def numbers(self, count: int, kind: int) -> bytes:
        """Activations or weights of a type."""
        wild = self.chance.random() < 0.5
        if kind == F32:
            scale = 10.0 ** self.chance.randint(-44, 37)
            plain = (self.chance.gauss(0, 1) * scale for _ in range(count))
            values = [self.chance.choice(FLOATS) if wild and self.chance.random() < 0.1 else value for value in plain]
            return struct.pack(f"<{count}f", *map(_single, values))
        halves = [self.chance.randrange(1 << 16) if wild else 0x3C00 + self.chance.randrange(256) for _ in range(count)]
        return struct.pack(f"<{count}H", *halves)

    def shape(self, multiple: int = 1) -> tuple[int, int]:
        rows = self.chance.choice([1, 2, 3, 4, 5, 7, 17])
        columns = self.chance.choice([1, 31, 32, 33, 63, 64, 65, 200, 255, 256, 257, 511, 513, 800])
        return rows, math.ceil(columns / multiple) * multiple

    def affine(self) -> None:
        bits, kind = self.chance.choice([4, 5, 6, 8]), self.chance.choice([BF16, F16, F32])
        rows, columns = self.shape()
        panels = self.place(self.noise(rows * affine_bytes(bits, columns)), 1)
        out = self.place(bytes(rows * columns * ITEM[kind]), 4)
        self.library.lamina_affine_decode(panels, *longs(rows, columns), bits, kind, out, 1)
        self.multiply("lamina_affine_linear", panels, rows, columns, bits)
        self.multiply("lamina_affine_quick", panels, rows, columns, bits)

    def multiply(self, name: str, panels: ctypes.c_void_p, rows: int, columns: int, number: int) -> None:
        kind, tokens = self.chance.choice([BF16, F16, F32]), self.chance.choice([1, 2, 3, 4, 5, 16])
        stride = rows + self.chance.choice([0, 3])
        x = self.place(self.numbers(tokens * columns, kind), 4)
        out = self.place(bytes(((tokens - 1) * stride + rows) * ITEM[kind]), 4)
        sizes = longs(rows, columns)
        getattr(self.library, name)(x, *longs(tokens), panels, *sizes, number, kind, out, *longs(stride), 1)

    def encode(self) -> None:
        bits, kind = self.chance.choice([4, 5, 6, 8]), self.chance.choice([BF16, F16, F32])
        rows, columns = self.shape()
        block = self.place(self.numbers(rows * columns, kind), 4)
        whole = 2 * 8191 / ((1 << bits) - 1)
        ranges = [(width * whole, shift * width * whole) for width in (1.03, 0.89) for shift in (0.0, 0.5, 1.0)]
        flat = [each for pair in ranges for each in pair]
        given = self.place(struct.pack(f"<{len(flat)}f", *flat), 4)
        panels = self.place(bytes(rows * affine_bytes(bits, columns)), 1)
        self.library.lamina_affine_encode(block, *longs(rows, columns), bits, kind, given, len(ranges), panels, 1)

    def gguf(self) -> None:
        number = self.chance.choice(list(GGUF))
        elements, size = GGUF[number]
        kind = self.chance.choice([BF16, F16, F32])
        rows, columns = self.shape(elements)
        panels = self.place(self.noise(rows * columns // elements * size), 1)
        out = self.place(bytes(rows * columns * ITEM[kind]), 4)
        assert not self.library.lamina_gguf_decode(panels, *longs(rows, columns), number, kind, out, 1)
        self.multiply("lamina_gguf_linear", panels, rows, columns, number)

    def lossless(self) -> None:
        count, own = self.chance.choice([1, 2, 3]), self.chance.choice([1, 255, 256, 257, 4095, 4096, 4097, 9000])
        last = self.chance.randint(1, own)
        fixed = 16 + 4 * math.ceil(own / 4096) + 320 * math.ceil(own / 256)
        size = fixed + self.chance.choice([0, 1, 47, 48, 49, own])
        elements = own * (count - 1) + last
        panels = self.place(self.noise(count * size), 1)
        out = self.place(bytes(2 * elements), 2)
        self.library.lamina_bf16z_decode(panels, *longs(count, size, own, elements), out, 1)
        bits = self.place(self.numbers(elements, BF16), 2)
        encode = self.library.lamina_bf16z_encode
        encode.restype = ctypes.c_int64
        need = encode(bits, *longs(elements, own), 1, *longs(0), None, 1)
        packed = self.place(bytes(count * need), 1)
        assert encode(bits, *longs(elements, own), 1, *longs(need), packed, 1) == need
        assert not self.library.lamina_bf16z_decode(packed, *longs(count, need, own, elements), out, 1)
        assert ctypes.string_at(out, 2 * elements) == ctypes.string_at(bits, 2 * elements)

    def books(self) -> None:
        """Code books of random points, all of their size."""
        for book, count in enumerate((256 * 8, 512 * 8, 1024 * 8, 256 * 4, 512 * 4, 2048 * 8)):
            points = self.place(self.chance.randbytes(count), 1)
            assert not self.library.lamina_gguf_book(book, points, *longs(count))


def longs(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def affine_bytes(bits: int, columns: int) -> int:
    """Of a row; see affine.py."""
    return math.ceil(columns / 64) * 66 if bits == 8 else 4 + math.ceil(columns / 32) * (2 + 4 * bits)


def _single(value: float) -> float:
    """What fp32 has in place of a number beyond its range."""
    return math.copysign(3.4e38, value) if math.isfinite(value) and abs(value) > 3.4e38 else value


def main(path: str, seed: int, rounds: int) -> None:
    driver = Driver(ctypes.CDLL(path), seed)
    driver.books()
    calls = (driver.affine, driver.encode, driver.gguf, driver.lossless)
    for number in range(rounds):
        driver.keep = driver.keep[:6]  # the books stay
        call = calls[number % len(calls)]
        print(number, call.__name__, flush=True)
        call()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
