"""The blocks of GGUF files as codecs: `gguf.Q4_K` and the others that `lamina.checkpoint.gguf` names.

A panel is one row, a row is a run of blocks. A block holds small whole numbers (*levels*), scales for groups of
them and, in some types, what is taken off afterwards; layouts as in ggml-quants.c. What is unpacked has the very
bits that `gguf.quants.dequantize` gives in fp32, rounded once where `out` has fewer.

Kernels in C (gguf_kernels.c) unpack and multiply; without a compiler torch unpacks the usual types, a few rows at a
time, so that levels and fp32 values stay in the processor's cache. The code books of the IQ1, IQ2 and IQ3 types are the
`gguf` package's, which also unpacks the other types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy
import torch

from lamina.checkpoint.gguf import BLOCK_TYPES, CODEC_PREFIX
from lamina.codec import native
from lamina.codec.codec import Codec, codec_for, register
from lamina.codec.quantized_layouts import Packed
from lamina.errors import CheckpointError, UnsupportedError

CHUNK = 1 << 18
"""Elements unpacked at once by torch: one megabyte of fp32."""

LINEAR_TOKENS = 8
"""Beyond, unpacking a block of rows and torch's own product are quicker."""

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice those of e2m1

Tensor = torch.Tensor


class Parts(NamedTuple):
    """What some blocks hold: `levels * scales - minimums` are their values.

    Attributes:
        levels: uint8 or int8 of shape (blocks, elements of a block).
        scales: fp32 of shape (blocks, groups), the groups all of one size.
        minimums: of the same shape, or None.
    """

    levels: Tensor
    scales: Tensor
    minimums: Tensor | None = None


class GgufBlocks(Codec):
    """A type of blocks, unpacked by the kernels in C; without them by torch or the `gguf` package, to the same bits.

    Attributes:
        number: of the type in a GGUF file.
        block: elements of a block.
        nbytes: bytes of a block.
    """

    linear_tokens = LINEAR_TOKENS

    def __init__(self, number: int, parts: Callable[[Tensor], Parts] | None) -> None:
        self.kind, self.block, self.nbytes = BLOCK_TYPES[number]
        self.name, self.number, self._parts = CODEC_PREFIX + self.kind, number, parts

    def unpack(self, panels: Tensor, rows: int, columns: int, out: Tensor) -> None:
        """See `Codec.unpack`."""
        self._check(panels, rows, columns)
        kernels = self._kernels(out)
        if kernels is not None:
            matrix = (panels.contiguous().data_ptr(), rows, columns, self.number, native.type_code(out.dtype))
            if kernels.lamina_gguf_decode(*matrix, out.data_ptr(), torch.get_num_threads()) == 0:
                return
        blocks, values = panels.reshape(-1, self.nbytes), out.view(-1, self.block)
        step = CHUNK // self.block
        for at in range(0, len(blocks), step):
            self._unpack(blocks[at : at + step], values[at : at + step])

    def linear(self, x: Tensor, panels: Tensor, rows: int, out: Tensor) -> bool:
        """See `Codec.linear`. Sums are in fp32, of weights that are not rounded to x's type."""
        tokens, columns = x.shape
        kernels = self._kernels(x)
        if kernels is None or not 0 < tokens <= LINEAR_TOKENS:
            return False
        self._check(panels, rows, columns)
        matrix = (panels.data_ptr(), rows, columns, self.number, native.type_code(x.dtype))
        threads = torch.get_num_threads()
        failed: int = kernels.lamina_gguf_linear(x.data_ptr(), tokens, *matrix, out.data_ptr(), out.stride(0), threads)
        return not failed

    def _kernels(self, tensor: Tensor) -> Any:
        """The kernels, if they take such a tensor and have this type's code book; or None."""
        kernels = native.kernels_for(tensor)
        if kernels is None or self.kind not in _BOOKS:
            return kernels
        return kernels if _give_book(kernels, *_BOOKS[self.kind]) else None

    def _unpack(self, blocks: Tensor, out: Tensor) -> None:
        if self._parts is None:
            quants, kind = _gguf_package(self.kind)
            with numpy.errstate(all="ignore"):
                out.copy_(torch.from_numpy(quants.dequantize(blocks.cpu().numpy(), kind)))
            return
        parts = self._parts(blocks)
        real = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        grouped = real.view(len(out), parts.scales.shape[1], -1)
        real.copy_(parts.levels)
        grouped.mul_(parts.scales.unsqueeze(2))
        if parts.minimums is not None:
            grouped.sub_(parts.minimums.unsqueeze(2))
        if real is not out:
            out.copy_(real)

    def _check(self, panels: Tensor, rows: int, columns: int) -> None:
        """What keeps the kernels inside the panels."""
        wanted = (rows, columns // self.block * self.nbytes)
        if tuple(panels.shape) != wanted or columns % self.block:
            raise CheckpointError(
                f"{rows} rows of {columns} columns in {self.name} are {rows} panels of {wanted[1]} bytes, here are "
                f"{panels.shape[0]} of {panels.shape[1]}: the checkpoint's encoding is not that of its tensors"
            )


class PlainCodec(Codec):
    """Rows of plain elements: panels of one row, so that the rows may lie in any order."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def unpack(self, panels: Tensor, rows: int, columns: int, out: Tensor) -> None:
        """See `Codec.unpack`."""
        if panels.data_ptr() % self.dtype.itemsize or panels.storage_offset() % self.dtype.itemsize:
            panels = panels.clone()
        out.copy_(panels.view(self.dtype).view(rows, columns))


def _gguf_package(kind: str) -> tuple[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise UnsupportedError(f"{kind} blocks need the gguf package: pip install 'lamina[gguf]'") from error
    return quants, GGMLQuantizationType[kind]


@cache
def _give_book(kernels: Any, book: int, kind: str) -> bool:
    """Hands a type's code book, which the `gguf` package has, to the kernels; whether they took it."""
    quants, _ = _gguf_package(kind)
    holder = getattr(quants, kind)
    holder.init_grid()
    points = numpy.ascontiguousarray(holder.grid, dtype=numpy.int8)
    given: int = kernels.lamina_gguf_book(book, points.ctypes.data, points.size)
    return given == 0


def _half(blocks: Tensor, at: int) -> Tensor:
    """An fp16 number of each block as fp32, of shape (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Each run of bytes as its low nibbles, then its high ones; shape (blocks, runs, 2, run)."""
    source = packed.view(len(packed), -1, run)
    levels = torch.empty(*source.shape[:2], 2, run, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(source, 15, out=levels[:, :, 0])
    torch.bitwise_right_shift(source, 4, out=levels[:, :, 1])
    return levels


def _pairs(packed: Tensor, run: int) -> Tensor:
    """Each run of bytes as its lowest two bits, then the next, four times; shape (blocks, runs, 4, run)."""
    source = packed.view(len(packed), -1, run)
    levels = torch.empty(*source.shape[:2], 4, run, dtype=torch.uint8, device=packed.device)
    for i in range(4):
        torch.bitwise_right_shift(source, 2 * i, out=levels[:, :, i])
    return levels.bitwise_and_(3)


def _bits(packed: Tensor, value: int) -> Tensor:
    """`value` or 0 for the bits of each byte, one byte after the other."""
    shifts = torch.arange(8, dtype=torch.uint8)
    table = ((torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> shifts) & 1) * value
    words = table.view(torch.int64).flatten().to(packed.device)  # eight bytes are looked up as one
    return words[packed.int()].view(torch.uint8)


def _planes(packed: Tensor, value: int) -> Tensor:
    """`value` or 0 for the lowest bit of all bytes, then for the next one; shape (blocks, 8, bytes)."""
    planes = torch.empty(len(packed), 8, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(8):
        torch.bitwise_right_shift(packed, i, out=planes[:, i])
    return planes.bitwise_and_(1).mul_(value)


def _looked_up(levels: tuple[int, ...], packed: Tensor) -> Tensor:
    """The level of each low nibble of 16 bytes, then of each high one, as int8."""
    table = torch.tensor(levels, dtype=torch.int8, device=packed.device)
    nibbles = _nibbles(packed, 16)
    return table[nibbles.flatten(1).int()]


def _signed(levels: Tensor, zero: int) -> Tensor:
    """Levels counted from `zero`, as int8 of shape (blocks, elements)."""
    return levels.view(torch.int8).sub_(zero).flatten(1)


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_signed(_nibbles(blocks[:, 2:], 16), 8), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return Parts(_nibbles(blocks[:, 4:], 16).flatten(1), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Parts:
    levels = _nibbles(blocks[:, 6:], 16).flatten(1).bitwise_or_(_bits(blocks[:, 2:6], 16))
    return Parts(_signed(levels, 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    levels = _nibbles(blocks[:, 8:], 16).flatten(1).bitwise_or_(_bits(blocks[:, 4:8], 16))
    return Parts(levels, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[:, 2:].view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Parts:
    packed = blocks[:, :16]
    scales, minimums = _half(blocks, 80) * (packed & 15), _half(blocks, 82) * (packed >> 4)
    return Parts(_pairs(blocks[:, 16:80], 32).flatten(1), scales, minimums)


def _q3_k(blocks: Tensor) -> Parts:
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8).flatten(1)
    high = _pairs(packed[:, 8:], 4).flatten(1)
    scales = _signed(low.bitwise_or_(high << 4), 32)
    levels = _pairs(blocks[:, 32:96], 32).flatten(1)
    # A bit that is set takes nothing off: the level counts from 4 with it.
    levels.bitwise_or_(_planes(blocks[:, :32], 4).flatten(1))
    return Parts(_signed(levels, 4), _half(blocks, 108) * scales)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of Q4_K and Q5_K, fp32 of shape (blocks, 8)."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minimums


def _q4_k(blocks: Tensor) -> Parts:
    return Parts(_nibbles(blocks[:, 16:], 32).flatten(1), *_six_bits(blocks))


def _q5_k(blocks: Tensor) -> Parts:
    levels = _nibbles(blocks[:, 48:], 32).flatten(1)
    return Parts(levels.bitwise_or_(_planes(blocks[:, 16:48], 16).flatten(1)), *_six_bits(blocks))


def _q6_k(blocks: Tensor) -> Parts:
    levels = _nibbles(blocks[:, :128], 64).flatten(1)
    levels.bitwise_or_(_pairs(blocks[:, 128:192], 32).flatten(1).bitwise_left_shift_(4))
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return Parts(_signed(levels, 32), _half(blocks, 208) * scales)


def _iq4_nl(blocks: Tensor) -> Parts:
    return Parts(_looked_up(_IQ4_LEVELS, blocks[:, 2:]), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Parts:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4].unsqueeze(2) >> shifts) & 3).flatten(1)
    scales = _signed(low.bitwise_or_(high << 4), 32)
    return Parts(_looked_up(_IQ4_LEVELS, blocks[:, 8:]), _half(blocks, 0) * scales)


def _mxfp4(blocks: Tensor) -> Parts:
    exponent = blocks[:, :1].int()
    # Half of 2^(exponent - 127): the levels are twice what they stand for. The two least are subnormal.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return Parts(_looked_up(_FP4_LEVELS, blocks[:, 1:]), bits.view(torch.float32))


_UNPACKED: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


_BOOKS = {  # the number of a type's code book in the kernels, and whose it is
    "IQ2_XXS": (0, "IQ2_XXS"),
    "IQ2_XS": (1, "IQ2_XS"),
    "IQ2_S": (2, "IQ2_S"),
    "IQ3_XXS": (3, "IQ3_XXS"),
    "IQ3_S": (4, "IQ3_S"),
    "IQ1_S": (5, "IQ1_S"),
    "IQ1_M": (5, "IQ1_S"),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@cache
def register_all() -> None:
    """Make every type of blocks known to `codec_for`."""
    for kind, dtype in _PLAIN.items():
        register(PlainCodec(CODEC_PREFIX + kind, dtype))
    for number, (kind, _, _) in BLOCK_TYPES.items():
        register(GgufBlocks(number, _UNPACKED.get(kind)))


@dataclass(frozen=True)
class ExpertsAcross(Packed):
    """Experts whose columns are rows in the file, of one tensor, or of several of which each has every n-th: gpt-oss.

    Stored: the bytes of each tensor, (experts, its columns of the weight, bytes of such a row).

    Attributes:
        codecs: name of each tensor's.
    """

    codecs: tuple[str, ...]

    def rows(self, first: int, count: int, *stored: Tensor) -> Tensor:
        """See `Packed.rows`."""
        _, high, wide = self.shape
        out = torch.empty(count, wide, device=stored[0].device)
        done = 0
        while done < count:  # rows of one expert after the other
            expert, row = divmod(first + done, high)
            stop = min(row + count - done, high)
            for turn, (codec, tensor) in enumerate(zip(self.codecs, stored, strict=True)):
                columns = _columns(codec, tensor[expert], row, stop, high)
                out[done : done + stop - row, turn :: len(stored)] = columns.t()
            done += stop - row
        return out


def _columns(codec: str, rows: Tensor, first: int, stop: int, wide: int) -> Tensor:
    """Columns `first` to `stop` of rows of `wide` elements: float32 of shape (rows, columns)."""
    block = _ELEMENTS.get(codec, 1)
    nbytes = rows.shape[-1] * block // wide
    begin, end = first // block, -(-stop // block)
    out = torch.empty(len(rows), (end - begin) * block, device=rows.device)
    part = rows[:, begin * nbytes : end * nbytes].contiguous()
    codec_for(codec).unpack(part, len(rows), out.shape[1], out)
    return out[:, first - begin * block : stop - begin * block]


_ELEMENTS = {CODEC_PREFIX + kind: elements for kind, elements, _ in BLOCK_TYPES.values()}
