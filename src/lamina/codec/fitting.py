"""How the integers of `q4`, `q5`, `q6` and `q8` are found: slower than unpacking them, and apart from it.

For a group of weights several ranges are tried, a little wider and narrower than its own and shifted by up to half a
step: where a range lies matters more than its width, because the mean of a group is what must be right. Each gives
codes, and codes give their own best scale and centre by least squares; the range whose fit leaves the least squared
error wins. Then scales and centres are rounded to the row's units and the codes are found once more for these.

Every number depends on its row alone. For the search a group is written as whole numbers of at most fourteen bits, so
that all sums are exact in fp32, in whatever order and by whatever instructions they are made; what follows is arranged
so that no product is rounded before it is added. So a row becomes the same bytes in C and in torch, on any machine and
in any company.
"""

from __future__ import annotations

import torch

from lamina.codec import native
from lamina.errors import CheckpointError

GROUP = 32  # columns that share a scale in q4, q5 and q6
BLOCK = 64  # the same in q8
WIDTHS = {4: (1.03, 0.96, 0.89), 5: (1.02, 0.97, 0.92), 6: (1.01, 0.99, 0.97)}  # of the ranges tried, to a group's own
SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of each of them, in steps from one code to the next
REACH = 8191.0  # of the whole numbers that stand for a group's weights: 32 * 32 * REACH is less than 2^24
ELEMENTS = 1 << 18  # fitted at a time in torch: bounds what that takes besides
TINY = 1e-33  # REACH over less than that is beyond fp32; such weights are all the same to every model


def encode(block: torch.Tensor, bits: int, panel_bytes: int) -> torch.Tensor:
    """Rows as panels of q4, q5, q6 or q8: see `Affine.encode`."""
    panels = torch.empty(len(block), panel_bytes, dtype=torch.uint8, device=block.device)
    if not block.numel():
        return panels
    block = block.contiguous()
    kernels = native.kernels_for(block)
    if kernels is None:
        step = max(1, ELEMENTS // block.shape[1])
        for row in range(0, len(block), step):
            some = block[row : row + step]
            panels[row : row + step] = _blocks(some) if bits == 8 else _groups(some, bits)
        return panels
    ranges = _ranges(bits)
    failed = kernels.lamina_affine_encode(
        *(block.data_ptr(), *block.shape, bits, native.type_code(block.dtype), ranges.data_ptr(), len(ranges)),
        *(panels.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        _refuse_infinite(block)
        raise MemoryError(f"no memory for {block.shape[1]} columns of weights while they are encoded")
    return panels


def _refuse_infinite(weights: torch.Tensor) -> None:
    if not torch.isfinite(weights).all():
        raise CheckpointError(
            "a weight is infinite or not a number, which no scaled integer can hold: store the checkpoint lossless"
        )


def _ranges(bits: int) -> torch.Tensor:
    """Scale and centre of the ranges to try, [tries, 2], where a group reaches from -REACH to REACH; none for q8.

    A range that begins within a group's own or ends beyond it is worth more than a narrower one: see docs/codecs.md.
    """
    if bits == 8:
        return torch.empty(0, 2)
    whole = 2 * REACH / ((1 << bits) - 1)
    return torch.tensor([(width * whole, (0.5 + shift) * width * whole) for width in WIDTHS[bits] for shift in SHIFTS])


def _grouped(block: torch.Tensor, group: int) -> torch.Tensor:
    """As fp32 [rows, groups, group]; the last column is repeated to fill a group, which widens no range."""
    _refuse_infinite(block)
    rows = block.float()
    if missing := -rows.shape[1] % group:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    grouped: torch.Tensor = rows.view(len(rows), -1, group)
    return grouped


def _groups(block: torch.Tensor, bits: int) -> torch.Tensor:
    rows = _grouped(block, GROUP)
    scale, centre = _fit(rows, bits)
    d, m = _up_to_bf16(scale.amax(1) / 255), _up_to_bf16(centre.abs().amax(1) / 127)
    s = (scale / _or_one(d)[:, None]).round_().clamp_(0, 255)
    s = torch.where((s == 0) & (scale > 0), 1, s)
    c = (centre / _or_one(m)[:, None]).round_().clamp_(-127, 127)
    units = torch.stack([d, m], dim=1).bfloat16().view(torch.uint8)
    planes = _planes(_codes(rows, d[:, None] * s, m[:, None] * c, bits), bits)
    return torch.cat([units, s.to(torch.uint8), c.to(torch.int8).view(torch.uint8), *planes], dim=1)


def _fit(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre of each group of rows, shape [rows, groups, 32]."""
    low, high = rows.amin(2), rows.amax(2)
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    factor = torch.where(half > TINY, half.reciprocal() * REACH, 0)
    x = ((rows - middle.unsqueeze(2)) * factor.unsqueeze(2)).round_()
    number, total, shared, spread = _search(x, bits)
    slope, unit = shared.float() / spread.clamp(min=1).float(), half / REACH
    # In double precision the products of two fp32 are exact, and it does not matter whether a compiler fuses them.
    offset = ((total.double() - slope.double() * number.double()) / GROUP).float()
    return slope * unit, (middle.double() + offset.double() * unit.double()).float()


def _search(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Sums over each group of whole numbers for the best of the ranges, as int32.

    Returns:
        of its codes; of the numbers themselves; covariance of both and variance of the codes, times 32 squared.
    """
    total = x.sum(2).int()
    best, found = torch.full_like(total, -1, dtype=torch.float32), total.new_zeros(4, *total.shape)
    for scale, centre in _ranges(bits).to(x.device):
        codes = _codes(x, scale.expand(total.shape), centre.expand(total.shape), bits)
        number, squares = codes.sum(2).int(), (codes * codes).sum(2).int()
        shared, spread = 32 * codes.mul_(x).sum(2).int() - number * total, 32 * squares - number * number
        gain = shared.float() / spread.clamp(min=1).float() * shared.float()  # what the fit takes from the error
        better = gain > best
        best = torch.where(better, gain, best)
        found = torch.where(better, torch.stack([number, total, shared, spread]), found)
    return found.unbind(0)


def _codes(x: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes of groups, about zero, as floats."""
    factor = torch.where(scale > TINY, scale.reciprocal(), 0)
    half = 2 ** (bits - 1)
    return (x - centre.unsqueeze(2)).mul_(factor.unsqueeze(2)).round_().clamp_(-half, half - 1)


def _planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes as nibbles and, above four bits, the bits on top: each [rows, bytes]."""
    codes = (codes + 2 ** (bits - 1)).to(torch.uint8)
    low = codes & 15
    planes = [(low[..., :16] | low[..., 16:] << 4).flatten(1)]
    if high_bits := bits - 4:
        places = torch.arange(0, 8, high_bits, dtype=torch.uint8, device=codes.device)
        high = (codes >> 4).view(*codes.shape[:2], -1, len(places))
        planes.append((high << places).sum(-1, dtype=torch.uint8).flatten(1))
    return planes


def _blocks(block: torch.Tensor) -> torch.Tensor:
    rows = _grouped(block, BLOCK)
    scale = _up_to_bf16(rows.abs().amax(2) / 127)
    factor = torch.where(scale > TINY, scale.reciprocal(), 0)
    codes = (rows * factor.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.bfloat16().view(torch.uint8), codes.flatten(1).view(torch.uint8)], dim=1)


def _up_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """The next bf16 that is not smaller; of what is not negative."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 1)
