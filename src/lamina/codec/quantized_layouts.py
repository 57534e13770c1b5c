"""What the bytes of a quantised checkpoint mean: one class for each layout, from stored tensors to numbers.

Each follows the definition that the format's own package computes with. The arithmetic is float32, rounded once
to the weight's dtype, a few rows at a time: a whole weight in float32 would be four times what the budget has for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lamina.codec.unpacking import (
    WORD,
    by_group,
    in_pairs,
    integers,
    look_up,
    of_columns,
    out_of_order,
    scaled,
    scales_of,
    spread,
    to_float,
    unpack,
)

CHUNK = 1 << 18  # elements unpacked at once: in float32 they stay in a processor's cache
ROWS_AT_ONCE = 32  # rows of a block come in multiples of this many: no packed word is cut in two
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns each nibble of a word holds


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
        """See `Packed.rows`."""
        weight = to_float(stored[0].view(-1, self.shape[-1])[first : first + count])
        if len(stored) > 2:
            weight = weight - spread(self._of_rows(stored[2].float(), first, count), self.block[1], self.shape[-1])
        scales = scales_of(stored[1])
        scales = self._of_rows(scales if self.factor == 1.0 else scales * self.factor, first, count)
        return scaled(weight, scales, self.block[1])

    def _of_rows(self, grid: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """The numbers of a grid for each of these rows: (count, columns of the grid), or one for all."""
        if grid.numel() == 1:
            return grid.view(1, 1)
        row = torch.arange(first, first + count, device=grid.device)
        high = self.shape[-2]
        return grid.reshape(-1, self.grid[1])[row // high * self.grid[0] + row % high // self.block[0]]


@dataclass(frozen=True)
class Float4(Packed):
    """Two E2M1 numbers to a byte, the lower four bits first: MXFP4, NVFP4.

    Stored: the bytes, a scale for each `group` of columns, and maybe one number that all scales are divided by.

    Attributes:
        group: columns that share a scale.
    """

    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        columns = self.shape[-1]
        packed = stored[0].view(torch.uint8).view(-1, columns // 2)[first : first + count]
        values = look_up(in_pairs(torch.tensor(E2M1, device=packed.device)), packed)
        scales = scales_of(stored[1].reshape(-1, columns // self.group)[first : first + count])
        if len(stored) > 2:
            scales = scales / stored[2].float()
        return scaled(values, scales, self.group)


@dataclass(frozen=True)
class Float4Experts(Packed):
    """Experts in MXFP4, one matrix each, whose rows are the columns of the weight: gpt-oss.

    Stored: the bytes (experts, columns of the weight, groups, bytes of a group), and the scales of the groups.

    Attributes:
        group: elements that share a scale.
    """

    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        _, high, wide = self.shape
        out = torch.empty(count, wide, device=stored[0].device)
        done = 0
        while done < count:  # rows of one expert after the other
            expert, row = divmod(first + done, high)
            stop = min(row + count - done, high)
            groups = slice(row // self.group, -(-stop // self.group))
            packed, scales = (part[expert, :, groups].reshape(wide, -1) for part in stored)
            across = look_up(in_pairs(torch.tensor(E2M1, device=packed.device)), packed)
            across = scaled(across, scales_of(scales), self.group)
            skip = row % self.group
            out[done : done + stop - row] = across[:, skip : skip + stop - row].t()
            done += stop - row
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
        """See `Packed.rows`."""
        columns, middle = self.shape[-1], 1 << (self.bits - 1)
        values = unpack(stored[0][first : first + count], self.bits, columns)
        scales = stored[1].reshape(-1, stored[1].shape[-1])
        scales = (scales[first : first + count] if scales.shape[0] > 1 else scales).float()
        group = out_of_order(stored[-1] if len(stored) > 2 + self.zeros else None, self.group)
        if not self.zeros:
            return by_group(values - middle, scales, group, self.group)
        words = stored[2][first * self.bits // WORD : -(-(first + count) * self.bits // WORD)]
        zeros = unpack(words.t(), self.bits, count).t()
        return by_group(values - of_columns(zeros, group, self.group, columns), scales, group, self.group)


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
        """See `Packed.rows`."""
        columns = self.shape[-1]
        values = unpack(stored[0][:, first : first + count].t(), self.bits, columns)
        words = slice(first * self.bits // WORD, -(-(first + count) * self.bits // WORD))
        zeros = unpack(stored[1][:, words], self.bits, count).t()
        zeros = (zeros + self.offset) % (1 << self.bits)
        scales = stored[2][:, first : first + count].t().float()
        group = out_of_order(stored[3] if len(stored) > 3 else None, self.group)
        return by_group(values - of_columns(zeros, group, self.group, columns), scales, group, self.group)


@dataclass(frozen=True)
class Awq(Packed):
    """AWQ's gemm layout, and Quark's: words hold the four bits of one input and eight outputs, in their own order.

    Stored: qweight (inputs, words), qzeros (groups, words), scales (groups, outputs).

    Attributes:
        group: inputs that share a scale.
        order: which of eight outputs each four bits of a word are.
        signed: whether four bits stand for -8 to 7, not for 0 to 15.
    """

    group: int
    order: tuple[int, ...] = AWQ_ORDER
    signed: bool = False

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        words = slice(first // 8, -(-(first + count) // 8))
        values, zeros = (self._outputs(part[:, words], count) for part in stored[:2])
        scales = stored[2][:, first : first + count].t().float()
        columns = self.shape[-1]
        return scaled(values - spread(zeros, self.group, columns), scales, self.group)

    def _outputs(self, words: torch.Tensor, count: int) -> torch.Tensor:
        across = words.t().contiguous()
        out = torch.empty(len(across), 8, across.shape[1], device=words.device)
        for nibble, column in enumerate(self.order):
            bits = (across >> 4 * nibble) & 15
            out[:, column] = (bits ^ 8) - 8 if self.signed else bits
        return out.view(-1, across.shape[1])[:count]


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
        """See `Packed.rows`."""
        columns = self.shape[-1]
        begin, end = first * columns, (first + count) * columns
        packed = stored[0].view(torch.uint8).view(-1)[begin // 2 : (end + 1) // 2]
        values = look_up(in_pairs(stored[2].float()).flip(-1), packed)
        low, high = begin // self.block, -(-end // self.block)
        absmax = stored[1][low:high]
        if self.nested_block:
            at = torch.arange(low, high, device=absmax.device) // self.nested_block
            absmax = stored[4].float()[absmax.int()] * stored[3].float()[at] + self.nested_offset
        scales = absmax.float().repeat_interleave(self.block)[begin - low * self.block :][: end - begin]
        return (values[begin % 2 :][: end - begin] * scales).view(count, columns)


@dataclass(frozen=True)
class Planes(Packed):
    """Integers of a few bits, of which neighbours lie in neighbouring words: HQQ, BitNet.

    Row by row, the first integers are what all the words have in their first place, the next what they have in their
    second, and so on. Words are bytes; of 3 bits they are int32 and hold ten.

    Attributes:
        bits: of an integer.
        high_first: whether the first place is the uppermost, not the lowest.
    """

    bits: int
    high_first: bool

    def integers(self, stored: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Those from `begin` to `end`: float32 of one dimension. The words may be stored as another dtype's bytes."""
        places = 10 if self.bits == 3 else 8 // self.bits
        words = stored.reshape(-1).view(torch.int32 if self.bits == 3 else torch.uint8)
        out = torch.empty(end - begin, device=words.device)
        at = begin
        while at < end:
            place, word = divmod(at, len(words))
            count = min(end - at, len(words) - word)
            shift = self.bits * (places - 1 - place if self.high_first else place)
            out[at - begin : at - begin + count] = (words[word : word + count] >> shift) & ((1 << self.bits) - 1)
            at += count
        return out


@dataclass(frozen=True)
class Hqq(Planes):
    """HQQ: an integer less the zero point of its group, rounded to the dtype of these, times the scale.

    Stored: the words, the scales, the zero points.

    Attributes:
        groups: how many there are.
        across: whether neighbours belong to neighbouring groups (HQQ's axis 0), not to the same (axis 1).
    """

    groups: int
    across: bool

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        columns = self.shape[-1]
        begin, end = first * columns, (first + count) * columns
        scales, zeros = (self._of_elements(part.view(-1), begin, end) for part in stored[1:])
        values = self.integers(stored[0], begin, end).sub_(zeros.float()).to(zeros.dtype)
        return (values.float() * scales.float()).view(count, columns)

    def _of_elements(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        if self.across:
            return numbers[torch.arange(begin, end, device=numbers.device) % self.groups]
        group = math.prod(self.shape) // self.groups
        low, high = begin // group, -(-end // group)
        return numbers[low:high].repeat_interleave(group)[begin - low * group :][: end - begin]


@dataclass(frozen=True)
class Ternary(Planes):
    """BitNet: -1, 0 and 1, stored one higher, and one scale.

    Stored: the bytes, the scale.

    Attributes:
        divided: whether the scale is what is divided by, not what is multiplied with.
    """

    divided: bool

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        columns = self.shape[-1]
        values = self.integers(stored[0], first * columns, (first + count) * columns).view(count, columns) - 1
        scale = stored[1].float().view(())
        return values / scale if self.divided else values * scale


@dataclass(frozen=True)
class Signed4(Packed):
    """torchao's Int4Tensor: two integers from -8 to 7 to a byte, the lower four bits first, times a scale, plus a zero.

    Stored: the bytes, the scales (groups, rows), and what is added (groups, rows).

    Attributes:
        group: columns that share a scale.
    """

    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        columns = self.shape[-1]
        packed = stored[0].view(torch.uint8).view(-1, columns // 2)[first : first + count]
        table = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device=packed.device)
        scales, zeros = (part.transpose(-1, -2).flatten(0, -2)[first : first + count].float() for part in stored[1:])
        values = scaled(look_up(in_pairs(table), packed), scales, self.group)
        return values.add_(spread(zeros, self.group, columns))


@dataclass(frozen=True)
class Mlx(Packed):
    """MLX: integers of a few bits in words, row by row, times the scale of their group, plus the least of the group.

    Stored: the words (rows, words), the scales (rows, groups), and what is added (rows, groups).

    Attributes:
        bits: of an integer.
        group: columns that share a scale.
    """

    bits: int
    group: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        columns = self.shape[-1]
        words, scales, least = (part.flatten(0, -2)[first : first + count] for part in stored)
        values = scaled(unpack(words.view(torch.int32), self.bits, columns), scales.float(), self.group)
        return values.add_(spread(least.float(), self.group, columns))


@dataclass(frozen=True)
class Codebooks(Packed):
    """AQLM: a small block of the weight is the sum of one entry of each codebook, times the scale of its rows.

    Stored: the codes (row groups, column groups, books), signed as their dtype is; the books (books, entries, rows
    of a block, columns of a block); the scales, one for each row group.
    """

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        codes, books, scales = stored
        entries, high = books.shape[1:3]
        groups = slice(first // high, -(-(first + count) // high))
        at = codes[groups].long() % entries
        total = books[0].flatten(1).float()[at[..., 0]]
        for book in range(1, len(books)):
            total += books[book].flatten(1).float()[at[..., book]]
        total *= scales.view(-1)[groups].float().view(-1, 1, 1)
        across = total.view(*at.shape[:2], high, -1).transpose(1, 2).reshape(-1, self.shape[-1])
        return across[first % high :][:count]


@dataclass(frozen=True)
class Vectors(Packed):
    """VPTQ: vectors down a column are entries of tables; other tables have what is added, and the columns far out.

    Stored, as `parts` says: indices (tables, vectors, words of a row, of which each number has the place in
    `centroids` in its lower bits and that in `res_centroids` above), the tables (tables, entries times length), the
    outliers' indices (1, vectors, columns) and table, the place of each column, and what each column is multiplied
    with and what is added to it.

    Attributes:
        parts: names of what is stored, in their order.
        length: of a vector.
        outlier_length: of a vector of the outliers, which are the first columns.
        columns: of one table.
        bits: of a place in `centroids`.
        bits_beside: of one in `res_centroids`.
    """

    parts: tuple[str, ...]
    length: int
    outlier_length: int
    columns: int
    bits: int
    bits_beside: int

    def rows(self, first: int, count: int, *stored: torch.Tensor) -> torch.Tensor:
        """See `Packed.rows`."""
        parts = dict(zip(self.parts, stored, strict=True))
        across = []
        if "outlier_indices" in parts:
            at = _unsigned(parts["outlier_indices"][0, _vectors(first, count, self.outlier_length)])
            across.append(self._down(at, parts["outlier_centroids"][0], self.outlier_length, first, count))
        for table, words in enumerate(parts["indices"]):
            at = integers(words[_vectors(first, count, self.length)], self.bits + self.bits_beside, self.columns)
            place = at & ((1 << self.bits) - 1)
            values = self._down(place, parts["centroids"][table], self.length, first, count)
            if self.bits_beside:
                values += self._down(at >> self.bits, parts["res_centroids"][table], self.length, first, count)
            across.append(values)
        out = torch.cat(across, 1)
        if "perm" in parts:
            out = out[:, _unsigned(parts["perm"]).argsort()]
        if "weight_scale" in parts:
            out = out * parts["weight_scale"].float() + parts["weight_bias"].float()
        return out

    @staticmethod
    def _down(at: torch.Tensor, table: torch.Tensor, length: int, first: int, count: int) -> torch.Tensor:
        """The vectors at places (vectors, columns), one below the other, from a row on."""
        values = table.view(-1, length).float()[at].transpose(1, 2)
        return values.reshape(-1, at.shape[1])[first % length :][:count]


def _vectors(first: int, count: int, length: int) -> slice:
    return slice(first // length, -(-(first + count) // length))


def _unsigned(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.long() & 0xFFFF if numbers.dtype.itemsize == 2 else numbers.long()


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of what is unpacked at once."""
    step = max(CHUNK // max(columns, 1) // ROWS_AT_ONCE, 1) * ROWS_AT_ONCE
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
