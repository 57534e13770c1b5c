"""Sizes are read as people write them, and written so that they can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import RequestError
from lamina.sizes import enough_size, format_rate, format_size, parse_memory, parse_size, short_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        (4_000_000_000, 4 * 10**9),
        ("4000000000", 4 * 10**9),
        ("4GB", 4 * 10**9),
        ("1e9", 10**9),
        ("1.5e9", 15 * 10**8),
        ("1.5E9 B", 15 * 10**8),
        (".7GB", 7 * 10**8),
        ("4.GB", 4 * 10**9),
        ("1_000MB", 10**9),
        ("4_000_000_000", 4 * 10**9),
        (4e9, 4 * 10**9),
        (0.7e9, 7 * 10**8),
        ("0.7e9", 7 * 10**8),
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
def test_a_size_is_read_as_written(text: float | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-4GB",
        "4 G B",
        "4XB",
        "four",
        "4,5GB",
        "0",
        "0.1B",
        "nan",
        0,
        -1,
        -4e9,
        "inf",
        "-1e9",
        "1e99",
        "1e999999999",
        "9" * 5000,
        "_1GB",
        "1__0GB",
        "1e",
        ".GB",
        "NaNGB",
        0.5,
        1e300,
        10**40,
    ],
)
def test_what_is_no_size_is_refused(text: float | str) -> None:
    with pytest.raises(RequestError):
        parse_size(text)


@pytest.mark.parametrize("value", [True, None, b"4GB", [4]])
def test_other_types_are_refused_by_the_name_of_the_argument(value: object) -> None:
    with pytest.raises(RequestError, match="memory must be bytes or text"):
        parse_size(value, what="memory")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match=f"memory must be a number of bytes, got {value}"):
        parse_size(value, what="memory")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("4", "4GB"), ("16", "16GB"), ("512", "512MB"), ("4B", "4GB"), ("8e3", "8000MB"), ("400000", "400000kB")],
)
def test_memory_without_its_unit_is_asked_about(text: str, meant: str) -> None:
    with pytest.raises(RequestError, match=rf"memory {text} is \d+ bytes: did you mean {meant}\?"):
        parse_memory(text)
    assert parse_memory(meant) >= 10**6
    assert parse_memory(1) == 1, "a number is taken at its word, and then found to be too small by name"


@given(st.integers(min_value=1, max_value=10**17))
def test_what_is_said_to_be_enough_is_enough_and_can_be_given(nbytes: int) -> None:
    assert nbytes <= parse_size(enough_size(nbytes)) < nbytes + 10**6
    assert abs(parse_size(short_size(nbytes)) - nbytes) <= 0.005 * nbytes


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
