"""Sizes as people write them: `"4GB"` is 4 x 10^9 bytes, `"4GiB"` is 4 x 2^30."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from lamina.errors import RequestError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}B"] = _UNITS[_letter] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power

# `4GB`, `4 GiB`, `.7GB`, `1_000MB`, `1.5e9`; no longer than a number of bytes can be
_SIZE = re.compile(r"\s*((?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,2})?)\s*([A-Za-z]*)\s*", re.ASCII)
_UNDERSCORE = re.compile(r"(?<=\d)_(?=\d)", re.ASCII)
_MOST = 2**63 - 1

LEAST_MEANT = 1_000_000  # less than this is no memory for a model: a unit was forgotten


def parse_size(value: float | str, *, what: str = "size") -> int:
    """Bytes of `4_000_000_000`, `4e9`, `"4GB"`, `"4 GiB"`, `".7GB"` or `"1.5e9"`.

    Raises:
        RequestError: not a number of bytes that a machine can have, or an unknown unit.
    """
    if not isinstance(value, str):
        return _bounded(_number(value, what), value, what)
    match = _SIZE.fullmatch(_UNDERSCORE.sub("", value))
    if match is None or match[2].upper() not in _UNITS:
        raise RequestError(f"{what} {value!r} is not a size: write for example 4GB, 4GiB or 4000000000")
    return _bounded(int(Fraction(match[1]) * _UNITS[match[2].upper()]), value, what)


def parse_memory(value: float | str, *, what: str = "memory") -> int:
    """As `parse_size`, for the memory that a model is given: text that is too little to be meant is asked about.

    Raises:
        RequestError: as for `parse_size`; or less than a megabyte, with what may have been meant.
    """
    size = parse_size(value, what=what)
    if isinstance(value, str) and size < LEAST_MEANT:
        raise RequestError(f"{what} {value.strip()} is {size} bytes: did you mean {meant(size)}?")
    return size


def meant(nbytes: int) -> str:
    """What may have been meant where the unit was forgotten."""
    return f"{nbytes}GB" if nbytes < 128 else f"{nbytes}MB" if nbytes < 100_000 else f"{nbytes}kB"


def _number(value: object, what: str) -> int:
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{what} must be a number of bytes, got {value!r}")
    if isinstance(value, bool) or not (isinstance(value, float) or hasattr(value, "__index__")):
        raise RequestError(f"{what} must be bytes or text such as '4GB', got {value!r}")
    return int(value)


def _bounded(size: int, value: object, what: str) -> int:
    if size <= 0:
        raise RequestError(f"{what} must be more than 0 bytes, got {value!r}")
    if size > _MOST:
        raise RequestError(f"{what} {value!r} is more than any machine has: write for example 4GB")
    return size


def format_size(nbytes: float) -> str:
    """`1234567890` as `"1.23 GB"`: three significant digits, decimal units."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5 or unit == "PB":
            break
        size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def short_size(nbytes: float) -> str:
    """As `format_size`, in one word: as it would be given."""
    return format_size(nbytes).replace(" ", "")


def enough_size(nbytes: int) -> str:
    """The least whole number of megabytes that is no less than so many bytes, as it would be given."""
    return f"{-(-nbytes // 1_000_000)}MB"


def format_seconds(seconds: float) -> str:
    """`95` as `"1 min 35 s"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_rate(bytes_per_second: float) -> str:
    """`1.2e9` as `"1.20 GB/s"`."""
    return f"{format_size(bytes_per_second)}/s"
