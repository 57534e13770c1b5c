"""How the integers of `q4`, `q5`, `q6` and `q8` are found: slower than decoding them, and apart from it.

For a group of weights several ranges are tried, from its whole range to less than two thirds of it. Each gives codes,
and codes give their own best scale and centre by least squares; the range whose fit leaves the least squared error
wins. Then scales and centres are rounded to the row's units and the codes are found once more for these.

Every number depends on its row alone. For the search a group is written as whole numbers of at most fourteen bits, so
that all sums are exact in fp32, in whatever order and by whatever instructions they are made: in C and in torch, on
any machine and in any company a row becomes the same bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from lamina.codec import native
from lamina.errors import CheckpointError

TRIES = 16  # ranges for a group, from WIDEST of its own to a part that fewer bits want smaller
WIDEST = 1.04
NARROWEST = {4: 0.64, 5: 0.8, 6: 0.9}
REACH = 8191.0  # of the whole numbers that stand for a group's weights: 32 * 32 * REACH is less than 2^24
ELEMENTS = 1 << 20  # fitted at a time: bounds what that takes besides
TINY = 1e-37  # a smaller scale has no reciprocal in fp32, and nothing to scale


def encode_groups(block: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rows as q4, q5 or q6: uint8 of shape (rows, panel bytes), as affine.py says."""
    return _in_steps(block, group, lambda rows: _groups(rows, bits))


def encode_blocks(block: torch.Tensor, size: int) -> torch.Tensor:
    """Rows as q8."""
    return _in_steps(block, size, _blocks)


def _in_steps(block: torch.Tensor, group: int, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    rows, columns = block.shape
    step = max(1, ELEMENTS // columns)
    return torch.cat([encode(_grouped(block[row : row + step], group)) for row in range(0, rows, step)])


def _grouped(block: torch.Tensor, group: int) -> torch.Tensor:
    """As fp32 [rows, groups, group]; the last column is repeated to fill a group, which widens no range."""
    rows = block.float()
    if missing := -rows.shape[1] % group:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    return rows.contiguous().view(len(rows), rows.shape[1] // group, group)


def _refuse_infinite(extremes: torch.Tensor) -> None:
    if not torch.isfinite(extremes).all():
        raise CheckpointError(
            "a weight is infinite or not a number, which no scaled integer can hold: store the checkpoint lossless"
        )


def _groups(rows: torch.Tensor, bits: int) -> torch.Tensor:
    scale, centre = _fit(rows, bits)
    d, m = _up_to_bf16(scale.amax(1) / 255), _up_to_bf16(centre.abs().amax(1) / 127)
    s = (scale / _or_one(d)[:, None]).round_().clamp_(0, 255)
    s = torch.where((s == 0) & (scale > 0), 1, s)
    c = (centre / _or_one(m)[:, None]).round_().clamp_(-127, 127)
    units = torch.stack([d, m], dim=1).bfloat16().view(torch.uint8)
    planes = _planes(rows, d[:, None] * s, m[:, None] * c, bits)
    return torch.cat([units, s.to(torch.uint8), c.to(torch.int8).view(torch.uint8), planes], dim=1)


def _fit(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre of each group of rows, shape [rows, groups, 32]."""
    low, high = rows.amin(2), rows.amax(2)
    _refuse_infinite(torch.stack([low, high]))
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    factor = torch.where(half > TINY, REACH / half, 0)
    number, total, shared, spread = _search(rows, middle, factor, bits)
    slope = shared.float() / spread.clamp(min=1).float()
    unit = half / REACH
    return slope * unit, middle + (total - slope * number) / rows.shape[2] * unit


def _search(rows: torch.Tensor, middle: torch.Tensor, factor: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Sums over each group for the best of the ranges, as int32.

    Returns:
        of its codes; of its weights as whole numbers; covariance of both and variance of the codes, times 32 squared.
    """
    steps = torch.linspace(WIDEST, NARROWEST[bits], TRIES) * (2 * REACH / (2**bits - 1))
    found = torch.zeros(4, *middle.shape, dtype=torch.int32, device=rows.device)
    if (kernels := _kernels(rows)) is not None:
        pointers = (each.data_ptr() for each in (rows, middle, factor, steps, found))
        kernels.lamina_affine_search(*pointers, middle.numel(), TRIES, bits, torch.get_num_threads())
        return found.unbind(0)
    x = ((rows - middle.unsqueeze(2)) * factor.unsqueeze(2)).round_()
    total, best = x.sum(2).int(), torch.full_like(middle, -1)
    for step in steps:
        codes = _codes(x, torch.full_like(middle, step), torch.full_like(middle, step / 2), bits)
        number, squares = codes.sum(2).int(), (codes * codes).sum(2).int()
        shared, spread = 32 * codes.mul_(x).sum(2).int() - number * total, 32 * squares - number * number
        gain = shared.float() / spread.clamp(min=1).float() * shared.float()  # what the fit takes from the error
        better = gain > best
        best = torch.where(better, gain, best)
        found = torch.where(better, torch.stack([number, total, shared, spread]), found)
    return found.unbind(0)


def _kernels(rows: torch.Tensor) -> ctypes.CDLL | None:
    return native.library() if rows.device.type == "cpu" else None


def _codes(x: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes of groups, about zero, as floats."""
    factor = torch.where(scale > TINY, 1 / scale, 0)
    half = 2 ** (bits - 1)
    return (x - centre.unsqueeze(2)).mul_(factor.unsqueeze(2)).round_().clamp_(-half, half - 1)


def _planes(rows: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes as nibbles and, above four bits, the bits on top: [rows, bytes]."""
    if (kernels := _kernels(rows)) is not None:
        planes = torch.empty(rows.shape[0], rows.shape[1] * 4 * bits, dtype=torch.uint8)
        pointers = (each.data_ptr() for each in (rows, scale, centre, planes))
        kernels.lamina_affine_pack(*pointers, *rows.shape[:2], bits, torch.get_num_threads())
        return planes
    codes = (_codes(rows, scale, centre, bits) + 2 ** (bits - 1)).to(torch.uint8)
    low = codes & 15
    parts = [(low[..., :16] | low[..., 16:] << 4).flatten(1)]
    if high_bits := bits - 4:
        places = torch.arange(0, 8, high_bits, dtype=torch.uint8, device=codes.device)
        high = (codes >> 4).unflatten(2, (-1, len(places)))
        parts.append((high << places).sum(-1, dtype=torch.uint8).flatten(1))
    return torch.cat(parts, dim=1)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    most = torch.maximum(rows.amax(2), -rows.amin(2))
    _refuse_infinite(most)
    scale = _up_to_bf16(most / 127)
    factor = torch.where(scale > TINY, 1 / scale, 0)
    codes = (rows * factor.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.bfloat16().view(torch.uint8), codes.flatten(1).view(torch.uint8)], dim=1)


def _up_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """The next bf16 that is not smaller; of what is not negative."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 1)
