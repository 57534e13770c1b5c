"""From stored bytes and words to float32, and what is multiplied with their groups: what many layouts do alike."""

from __future__ import annotations

import functools

import torch

WORD = 32  # bits


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` unsigned integers of each row of int32 words, which are a stream of bits from the lowest on.

    Returns:
        float32 of shape (rows, count).
    """
    if bits in (4, 8):
        packed = words.flatten().view(torch.uint8).view(*words.shape[:-1], -1)
        values = packed.float() if bits == 8 else look_up(in_pairs(torch.arange(16.0, device=words.device)), packed)
        return values[..., :count]
    return integers(words, bits, count).float()


def integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`unpack` of up to 32 bits: int64."""
    place = torch.arange(count, device=words.device) * bits
    word, shift = place // WORD, place % WORD
    unsigned = words.long() & 0xFFFFFFFF
    next_word = (word + 1).clamp(max=words.shape[-1] - 1)
    values = (unsigned[..., word] | unsigned[..., next_word] << WORD) >> shift
    return values & ((1 << bits) - 1)


def in_pairs(table: torch.Tensor) -> torch.Tensor:
    """Of a table of 16 numbers, the two that each byte stands for, the lower four bits first: float32 (256, 2)."""
    return torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)


def look_up(table: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """The numbers of bytes, one or two each: a table is several times quicker than torch's own conversions.

    Args:
        table: float32 (256,) or (256, 2).
        packed: uint8 (..., bytes).

    Returns:
        float32 (..., numbers).
    """
    as_one = table.contiguous().view(torch.float64).view(-1) if table.dim() == 2 else table  # two floats at once
    found = as_one.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    return found.view(*packed.shape[:-1], -1)


def spread(values: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Each of a row's numbers `group` times, as many as there are columns; one number is left to broadcast."""
    if values.shape[-1] == 1:
        return values
    return values.repeat_interleave(group, -1)[..., :columns]


def scaled(values: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Numbers of shape (rows, columns), which are overwritten, times the scale of their group of columns."""
    rows, columns = values.shape
    if scales.shape[-1] > 1 and scales.shape[-1] * group == columns:
        return values.view(rows, -1, group).mul_(scales.unsqueeze(-1)).view(rows, columns)
    return values.mul_(spread(scales, group, columns))


def by_group(values: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor | None, group: int) -> torch.Tensor:
    """`scaled`, or where groups do not follow one another, by each column's own."""
    if group_of is None:
        return scaled(values, scales, group)
    return values.mul_(of_columns(scales, group_of, group, values.shape[-1]))


def of_columns(values: torch.Tensor, group_of: torch.Tensor | None, group: int, columns: int) -> torch.Tensor:
    """The number of each column's group."""
    return spread(values, group, columns) if group_of is None else values.index_select(-1, group_of)


def out_of_order(group_of: torch.Tensor | None, group: int) -> torch.Tensor | None:
    """The group of each column, None where they simply follow one another, which some files say with -1."""
    if group_of is None or (group_of < 0).any():
        return None
    in_order = torch.arange(len(group_of), device=group_of.device) // group
    return None if torch.equal(in_order, group_of.long()) else group_of.int()


def to_float(values: torch.Tensor) -> torch.Tensor:
    """Numbers of any dtype as new float32."""
    if values.dtype.itemsize > 1 or not values.is_floating_point():
        return values.to(torch.float32, copy=True)
    if values.shape[-1] % 2 or not values.is_contiguous():
        return look_up(_codes(values.dtype, values.device), values.contiguous().view(torch.uint8))
    pairs = values.view(torch.int16).flatten().int() & 0xFFFF
    found = _pairs_of_codes(values.dtype, values.device).index_select(0, pairs)
    return found.view(torch.float32).view(values.shape)


def _codes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


@functools.cache
def _pairs_of_codes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two numbers of every two bytes, as one of 64 bits each: half a megabyte, made once."""
    codes = _codes(dtype, device)
    return torch.stack((codes.repeat(256), codes.repeat_interleave(256)), -1).view(torch.float64).view(-1)


def scales_of(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents of two (E8M0)."""
    return (scales.float() - 127.0).exp2() if scales.dtype == torch.uint8 else scales.float()
