"""Sizes as people write them: `"4GB"` is 4 x 10^9 bytes, `"4GiB"` is 4 x 2^30."""

from __future__ import annotations

import re

from lamina.errors import RequestError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}B"] = _UNITS[_letter] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str, *, what: str = "size") -> int:
    """Bytes of `4_000_000_000`, `"4GB"`, `"4 GiB"` or `"1.5G"`.

    Raises:
        RequestError: not a positive whole number of bytes, or an unknown unit.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RequestError(f"{what} must be bytes or text such as '4GB', got {value!r}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match[2].upper() not in _UNITS:
            raise RequestError(f"{what} {value!r} is not a size: write for example 4GB, 4GiB or 4000000000")
        number, unit = match[1], _UNITS[match[2].upper()]
        size = int(number) * unit if number.isdigit() else int(float(number) * unit)
    if size <= 0:
        raise RequestError(f"{what} must be more than 0 bytes, got {value!r}")
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
