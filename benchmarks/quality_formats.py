"""Ways to store a weight in fewer bits, as `quality.py` tries them: each turns rows of fp32 into what would come back.

    q4 q5 q6 q8           Lamina's own codecs, as they are
    a4g32/8:lsc           affine, 4 bits, groups of 32; scale and minimum of a group in 8 bits of a unit of the row
                          (`/h`: in fp16 each), found by `minmax` (default), `shrink8`, `kx20`, `hqq`, or one of STARTS
    s8g128                symmetric integers, one fp16 scale for 128 weights
    nf4 int8              AirLLM's two: bitsandbytes' NF4 in blocks of 64, its 8 bits in blocks of 2048; fp32 scales
    bf16                  as it is

All are data-free, and all but bitsandbytes' take each row alone.
"""

import re
from collections.abc import Callable

import torch

Format = tuple[Callable[[torch.Tensor], torch.Tensor] | None, Callable[[int], float]]
"""Decoded from encoded rows (None: as they are), and the bits a weight for a number of columns."""

Fit = tuple[torch.Tensor, torch.Tensor]
"""Scale and minimum of each group, [..., 1]."""

STARTS: dict[str, tuple[list[tuple[float, float]], int, int]] = {
    # (width of the range, shift in steps) of each start; refits of each; refits of the best
    "ls1": ([(1, 0)], 1, 4),
    "lsc": ([(0.97, -0.5), (0.97, 0), (0.97, 0.5)], 1, 2),
    "lsd": ([(0.97, shift) for shift in (-0.5, -0.25, 0, 0.25, 0.5)], 1, 2),
    "ls8": ([(width, shift) for width in (1, 0.93, 0.86) for shift in (-0.5, 0, 0.5)], 1, 2),
    "lsr": ([(1.04 - 0.4 * i / 15, 0) for i in range(16)], 1, 0),
    "lsrp": ([(1.04 - 0.4 * i / 15, 0) for i in range(16)], 1, 2),
}


def levels(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: int) -> torch.Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((x - minimum) * inverse).round_().clamp_(0, top)


def least_squares(x: torch.Tensor, q: torch.Tensor) -> Fit:
    """The scale and the minimum, not above zero, that fit levels q best."""
    count = x.shape[-1]
    sum_q, sum_x = q.sum(-1, True), x.sum(-1, True)
    sum_qq, sum_qx = (q * q).sum(-1, True), (q * x).sum(-1, True)
    spread = count * sum_qq - sum_q * sum_q
    scale = torch.where(spread > 0, (count * sum_qx - sum_q * sum_x) / spread.clamp(min=1e-30), 0)
    minimum = (sum_x - scale * sum_q) / count
    scale = torch.where(minimum > 0, sum_qx / sum_qq.clamp(min=1e-30), scale)
    return scale.clamp_(min=0), minimum.clamp_(max=0)


def error(x: torch.Tensor, fit: Fit, top: int) -> torch.Tensor:
    return (levels(x, *fit, top) * fit[0] + fit[1] - x).square_().sum(-1, True)


def best_of(x: torch.Tensor, fits: list[Fit], top: int) -> Fit:
    (scale, minimum), least = fits[0], error(x, fits[0], top)
    for fit in fits[1:]:
        this = error(x, fit, top)
        better = this < least
        scale, minimum = torch.where(better, fit[0], scale), torch.where(better, fit[1], minimum)
        least = torch.minimum(this, least)
    return scale, minimum


def find(x: torch.Tensor, top: int, how: str) -> Fit:
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    scale = (high - low) / top
    if how == "minmax":
        return scale, low
    if how == "hqq":
        return half_quadratic(x, top, scale, low)
    if how == "shrink8":
        return best_of(x, [(scale * f, low * f) for f in (1 - 0.3 * i / 8 for i in range(8))], top)
    if how == "kx20":  # llama.cpp's make_qkx2_quants without its weights: one end stays, the other moves
        tries = [scale * top / (top - 1 + 0.1 * i) for i in range(20)]
        return best_of(x, [least_squares(x, levels(x, each, low, top)) for each in tries], top)
    starts, refits, polish = STARTS[how]
    low, high = x.amin(-1, True), x.amax(-1, True)
    fits = []
    for width, shift in starts:
        fit = ((high - low) / top * width, low + (high - low) * ((1 - width) / 2 + shift / top))
        for _ in range(refits):
            fit = least_squares(x, levels(x, *fit, top))
        fits.append(fit)
    fit = best_of(x, fits, top)
    for _ in range(polish):
        fit = least_squares(x, levels(x, *fit, top))
    return fit


def half_quadratic(x: torch.Tensor, top: int, scale: torch.Tensor, low: torch.Tensor) -> Fit:
    """HQQ's solver for the zero point (Badri and Shaji 2023): p = 0.7, beta 10 growing by 1% a round, early stop."""
    beta, least = 10.0, float("inf")
    inverse = 1 / scale.clamp(min=1e-12)
    zero = -low * inverse
    for _ in range(20):
        q = (x * inverse + zero).round_().clamp_(0, top)
        left = x - (q - zero) * scale
        if (mean := float(left.abs().mean())) >= least:
            break
        least = mean
        size = left.abs()
        left = left.sign() * (size - size.clamp(min=1e-8).pow(-0.3) / beta).clamp(min=0)
        zero, beta = (q - (x - left) * inverse).mean(-1, True), beta * 1.01
    return scale, -zero * scale


def grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))


def affine(rows: torch.Tensor, bits: int, group: int, store: str, how: str) -> torch.Tensor:
    x, top = grouped(rows, group), 2**bits - 1
    scale, minimum = find(x, top, how)
    if store == "h":
        scale, minimum = scale.half().float(), minimum.half().float()
    else:
        scale, minimum = in_units(scale, int(store)), -in_units(-minimum, int(store))
    return (levels(x, scale, minimum, top) * scale + minimum).flatten(1)[:, : rows.shape[1]]


def in_units(x: torch.Tensor, bits: int) -> torch.Tensor:
    """As unsigned integers of a unit that each row has in fp16."""
    top = 2**bits - 1
    unit = (x.amax((1, 2), True) / top).half().float()
    return (x * torch.where(unit > 0, 1 / unit, 0)).round_().clamp_(0, top) * unit


def symmetric(rows: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    x, top = grouped(rows, group), 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, True) / top).half().float()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((x * inverse).round_().clamp_(-top, top) * scale).flatten(1)[:, : rows.shape[1]]


def lamina_codec(name: str) -> Format:
    from lamina.codec import affine as codecs

    codec = codecs.Affine(int(name[1:]))

    def again(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        codec.decode(codec.encode(rows), rows.shape[0], rows.shape[1], out)
        return out

    return again, lambda columns: 8 * codec.panel_bytes(columns) / columns


def nf4(rows: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(rows.contiguous(), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state).view(rows.shape)


def int8(rows: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_blockwise(*bnb.quantize_blockwise(rows.contiguous(), blocksize=2048))


def named(name: str) -> Format:
    """The format of that name; ValueError where there is none."""
    if name == "bf16":
        return None, lambda _columns: 16.0
    if name == "nf4":
        return nf4, lambda _columns: 4 + 32 / 64
    if name == "int8":
        return int8, lambda _columns: 8 + 32 / 2048
    if re.fullmatch(r"q[4568]", name):
        return lamina_codec(name)
    if match := re.fullmatch(r"s(\d)g(\d+)", name):
        bits, group = int(match[1]), int(match[2])
        return (lambda rows: symmetric(rows, bits, group)), lambda _columns: bits + 16 / group
    if match := re.fullmatch(r"a(\d)g(\d+)/([h\d])(?::(.+))?", name):
        bits, group, store, how = int(match[1]), int(match[2]), match[3], match[4] or "minmax"
        apart, row = (32, 0) if store == "h" else (2 * int(store), 32)
        return (
            lambda rows: affine(rows, bits, group, store, how)
        ), lambda columns: bits + apart / group + row / columns
    raise ValueError(f"there is no format {name!r}: see the head of quality_formats.py")
