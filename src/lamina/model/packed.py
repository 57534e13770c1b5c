"""What the bytes of a quantised checkpoint mean: one class for each layout, from stored tensors to numbers.

Each follows the definition that the format's own package computes with. The arithmetic is float32, rounded once
to the weight's dtype, a few rows at a time: a whole weight in float32 would be four times what the budget has for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

CHUNK = 1 << 20  # elements decoded at once
ROWS_AT_ONCE = 32  # rows of a block come in multiples of this many: no packed word is cut in two
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds each of its eight columns
_WORD = 32


@dataclass(frozen=True)
class Packed:
    """How stored tensors become a weight. Called with them, gives it.

    Attributes:
        shape: of the weight.
        dtype: of the weight.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, seen as a matrix of shape (everything else, last dimension).

        Args:
            first: a multiple of `ROWS_AT_ONCE`.
            count: rows.
            stored: the tensors of the checkpoint.

        Returns:
            float32 of shape (count, columns).
        """
        raise NotImplementedError

    def __call__(self, *stored: torch.Tensor) -> torch.Tensor:
        """The whole weight."""
        columns = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        out = torch.empty(rows, columns, dtype=self.dtype, device=stored[0].device)
        for first, count in blocks(rows, columns):
            out[first : first + count] = self.rows(first, count, *stored)
        return out.view(self.shape)


@dataclass(frozen=True)
class Scaled(Packed):
    """A number for each element, times the scale of its block: block FP8 (DeepSeek, Qwen), FP8 and int8 by row.

    Stored: the weight, its scales as one number or a grid, and with `zeros` a grid of zero points.

    Attributes:
        grid: rows and columns of the scales of one matrix.
        block: rows and columns that share a scale.
        factor: what every scale is multiplied with.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    factor: float = 1.0

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        weight = stored[0].view(-1, self.shape[-1])[first : first + count].float()
        if len(stored) > 2:
            weight = weight - self._spread(stored[2].float(), first, count)
        scales = to_float(stored[1])
        return weight * self._spread(scales if self.factor == 1.0 else scales * self.factor, first, count)

    def _spread(self, grid: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """The numbers of a grid for these rows, in shape (count, columns) or what broadcasts to it."""
        if grid.numel() == 1:
            return grid.view(1, 1)
        row = torch.arange(first, first + count, device=grid.device)
        high = self.shape[-2]
        of_row = grid.reshape(-1, self.grid[1])[row // high * self.grid[0] + row % high // self.block[0]]
        return spread(of_row, self.block[1], self.shape[-1])


@dataclass(frozen=True)
class Float4(Packed):
    """Two E2M1 numbers to a byte, the lower four bits first: MXFP4, NVFP4.

    Stored: the bytes, a scale for each `group` of columns, and maybe one number that all scales are divided by.

    Attributes:
        group: columns that share a scale.
    """

    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        columns = self.shape[-1]
        packed = stored[0].view(torch.uint8).view(-1, columns // 2)[first : first + count]
        values = torch.tensor(E2M1, device=packed.device)[torch.stack((packed & 15, packed >> 4), -1).int()]
        scales = to_float(stored[1].reshape(-1, columns // self.group)[first : first + count])
        if len(stored) > 2:
            scales = scales / stored[2].float()
        return values.view(count, columns) * spread(scales, self.group, columns)


@dataclass(frozen=True)
class Float4Experts(Packed):
    """Experts in MXFP4, one matrix each, whose rows are the columns of the weight: gpt-oss.

    Stored: the bytes (experts, columns of the weight, groups, bytes of a group), and the scales of the groups.

    Attributes:
        group: elements that share a scale.
    """

    group: int

    def __call__(self, *stored: torch.Tensor) -> torch.Tensor:
        experts, high, wide = self.shape
        out = torch.empty(self.shape, dtype=self.dtype, device=stored[0].device)
        across = Float4((experts, wide, high), self.dtype, self.group)
        for expert in range(experts):
            for first, count in blocks(wide, high):
                decoded = across.rows(expert * wide + first, count, *stored)
                out[expert, :, first : first + count] = decoded.t()
        return out


@dataclass(frozen=True)
class Integers(Packed):
    """Integers of a few bits in words of 32, row by row: compressed-tensors' pack-quantized.

    Stored: the words, the scales, then as they are there the zero points (packed along the rows) and the group of
    each column.

    Attributes:
        bits: of an integer.
        group: columns that share a scale.
        zeros: whether there are zero points.
    """

    bits: int
    group: int
    zeros: bool

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        columns, middle = self.shape[-1], 1 << (self.bits - 1)
        values = unpack(stored[0][first : first + count], self.bits, columns)
        scales = stored[1].reshape(-1, stored[1].shape[-1])
        scales = (scales[first : first + count] if scales.shape[0] > 1 else scales).float()
        group = stored[-1].long() if len(stored) > 2 + self.zeros else None
        if group is not None and (group < 0).any():  # the package's word for columns in their own order
            group = None
        if not self.zeros:
            return (values - middle) * by_group(scales, group, self.group, columns)
        words = stored[2][first * self.bits // _WORD : -(-(first + count) * self.bits // _WORD)]
        zeros = unpack(words.t(), self.bits, count).t()
        return (values - by_group(zeros, group, self.group, columns)) * by_group(scales, group, self.group, columns)


@dataclass(frozen=True)
class Gptq(Packed):
    """GPTQ: words hold integers of one output and neighbouring inputs, zero points those of neighbouring outputs.

    Stored: qweight (words, outputs), qzeros (groups, words), scales (groups, outputs), and g_idx, the group of each
    input, where columns were ordered by activation.

    Attributes:
        bits: of an integer.
        group: inputs that share a scale.
        offset: what is added to a zero point: 1 in the format that AutoGPTQ began with, 0 in its second version.
    """

    bits: int
    group: int
    offset: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        columns = self.shape[-1]
        values = unpack(stored[0][:, first : first + count].t(), self.bits, columns)
        words = slice(first * self.bits // _WORD, -(-(first + count) * self.bits // _WORD))
        zeros = unpack(stored[1][:, words], self.bits, count).t()
        zeros = (zeros + self.offset) % (1 << self.bits)
        scales = stored[2][:, first : first + count].t().float()
        group = stored[3].long() if len(stored) > 3 else None
        return (values - by_group(zeros, group, self.group, columns)) * by_group(scales, group, self.group, columns)


@dataclass(frozen=True)
class Awq(Packed):
    """AWQ's gemm layout: words hold the four bits of one input and eight outputs, in an order of their own.

    Stored: qweight (inputs, words), qzeros (groups, words), scales (groups, outputs).

    Attributes:
        group: inputs that share a scale.
    """

    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        words = slice(first // 8, -(-(first + count) // 8))
        values, zeros = (self._outputs(part[:, words], count) for part in stored[:2])
        scales = stored[2][:, first : first + count].t().float()
        columns = self.shape[-1]
        return (values - spread(zeros, self.group, columns)) * spread(scales, self.group, columns)

    @staticmethod
    def _outputs(words: torch.Tensor, count: int) -> torch.Tensor:
        values = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)[..., list(AWQ_ORDER)]
        return values.reshape(len(words), -1)[:, :count].t()


@dataclass(frozen=True)
class Lookup4(Packed):
    """bitsandbytes' nf4 and fp4: two places in a table to a byte, the upper four bits first, one scale a block.

    Stored: the bytes, absmax, the table; where absmax is itself stored in 8 bits, its own absmax and table.

    Attributes:
        block: elements, row by row, that share an absmax.
        nested_block: blocks that share an absmax of absmax, 0 where it is not nested.
        nested_offset: what is added to each nested absmax.
    """

    block: int
    nested_block: int = 0
    nested_offset: float = 0.0

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        columns = self.shape[-1]
        begin, end = first * columns, (first + count) * columns
        packed = stored[0].view(torch.uint8).view(-1)[begin // 2 : (end + 1) // 2]
        values = stored[2].float()[torch.stack((packed >> 4, packed & 15), -1).int()].view(-1)
        low, high = begin // self.block, -(-end // self.block)
        absmax = stored[1][low:high]
        if self.nested_block:
            at = torch.arange(low, high, device=absmax.device) // self.nested_block
            absmax = stored[4].float()[absmax.int()] * stored[3].float()[at] + self.nested_offset
        scales = absmax.float().repeat_interleave(self.block)[begin - low * self.block :][: end - begin]
        return (values[begin % 2 :][: end - begin] * scales).view(count, columns)


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of what is decoded at once."""
    step = max(CHUNK // max(columns, 1) // ROWS_AT_ONCE, 1) * ROWS_AT_ONCE
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` unsigned integers of each row of int32 words, which are a stream of bits from the lowest on.

    Returns:
        int32 of shape (rows, count).
    """
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
        values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return values.flatten(-2)[..., :count]
    place = torch.arange(count, device=words.device) * bits
    word, shift = place // _WORD, place % _WORD
    unsigned = words.long() & 0xFFFFFFFF
    next_word = (word + 1).clamp(max=words.shape[-1] - 1)
    values = (unsigned[..., word] | unsigned[..., next_word] << _WORD) >> shift
    return (values & ((1 << bits) - 1)).int()


def spread(values: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Each of a row's numbers `group` times, as many as there are columns; one number is left to broadcast."""
    if values.shape[-1] == 1:
        return values
    return values.repeat_interleave(group, -1)[..., :columns]


def by_group(values: torch.Tensor, group_of: torch.Tensor | None, group: int, columns: int) -> torch.Tensor:
    """`spread`, or the number of each column's own group where these do not follow one another."""
    return spread(values, group, columns) if group_of is None else values[..., group_of]


def to_float(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents of two (E8M0)."""
    return (scales.float() - 127.0).exp2() if scales.dtype == torch.uint8 else scales.float()
