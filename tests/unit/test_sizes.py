"""Sizes are read as people write them, and written so that they can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import RequestError
from lamina.sizes import format_rate, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        (4_000_000_000, 4 * 10**9),
        ("4000000000", 4 * 10**9),
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("4 GiB", 4 * 2**30),
        (" 4gb ", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("1.5k", 1500),
        ("1.5 MiB", 1572864),
        ("0.5TB", 5 * 10**11),
        ("12B", 12),
        ("2PiB", 2 * 2**50),
    ],
)
def test_a_size_is_read_as_written(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 G B", "4XB", "four", "1e9", "4,5GB", "0", "0.1B", "nan", 0, -1])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(RequestError):
        parse_size(text)


@pytest.mark.parametrize("value", [True, 4.0, None, b"4GB"])
def test_other_types_are_refused_by_the_name_of_the_argument(value: object) -> None:
    with pytest.raises(RequestError, match="memory must be bytes or text"):
        parse_size(value, what="memory")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.00 kB"),
        (1000, "1.00 kB"),
        (1234567890, "1.23 GB"),
        (12_345_678, "12.3 MB"),
        (612_000_000, "612 MB"),
        (999_600_000, "1.00 GB"),
        (4 * 2**30, "4.29 GB"),
        (10**19, "10000 PB"),
    ],
)
def test_a_size_is_written_with_three_digits(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


def test_a_rate_is_a_size_a_second() -> None:
    assert format_rate(1.2e9) == "1.20 GB/s"


@given(st.integers(min_value=1, max_value=10**18))
def test_whole_bytes_are_exact_in_every_spelling(nbytes: int) -> None:
    assert parse_size(nbytes) == parse_size(str(nbytes)) == parse_size(f"{nbytes} B") == nbytes


@given(st.integers(min_value=1, max_value=10**17))
def test_what_is_written_reads_back_within_half_a_percent(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= 0.005 * nbytes


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_clear_refusal(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except RequestError as error:
        assert repr(text) in str(error)
