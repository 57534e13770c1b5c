"""The same plan to the byte, the same passes with a draft, and no second way that is not listed, on every version.

Each version is compared with one table, recorded.json, so that they are equal to each other. docs/compatibility.md says
when it is written anew and how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compat.differences import DIFFERENCES
from compat.fallbacks import FALLBACKS
from compat.observed import VERSION, observed
from helpers.families import FAMILIES

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore::lamina.FallbackWarning")]
RECORDED = Path(__file__).with_name("recorded.json")
Table = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def recording(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--record", default=False))


@pytest.fixture(scope="module")
def recorded(recording: bool) -> Iterator[Table]:
    """family -> figure -> its value; version -> value where `DIFFERENCES` says so. One family a line."""
    table: Table = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    yield table
    if recording:
        lines = ",\n".join(f'"{family}": {json.dumps(table[family])}' for family in FAMILIES if family in table)
        RECORDED.write_text(f"{{\n{lines}\n}}\n")


def own_figures(family: str) -> tuple[str, ...]:
    """The figures of a family that differ between versions."""
    return DIFFERENCES[family].figures if family in DIFFERENCES else ()


def merged(family: str, before: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """A family's row with the figures of this version, and of the others as they were."""
    row = dict(figures)
    for name in own_figures(family):
        others = before.get(name)
        row[name] = dict(sorted({**(others if isinstance(others, dict) else {}), VERSION: figures[name]}.items()))
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_figures(family: str, recorded: Table, recording: bool) -> None:
    figures = asdict(observed(family).figures)
    if recording:
        recorded[family] = merged(family, recorded.get(family, {}), figures)
    row = dict(recorded[family])
    for name in own_figures(family):
        assert VERSION in row[name], f"{family} has a {name} of its own on each version and none for {VERSION} yet"
        row[name] = row[name][VERSION]
    assert figures.pop("weights") == pytest.approx(row.pop("weights"), rel=1e-5, abs=1e-2), "another checkpoint"
    assert figures == row


@pytest.mark.parametrize("family", FAMILIES)
def test_second_ways(family: str) -> None:
    listed, taken = FALLBACKS.get(family, {}), observed(family).fallbacks
    unlisted = [reason for reason in taken if not any(words in reason for words in listed)]
    assert not unlisted, f"{family} takes a second way that tests/compat/fallbacks.py does not list"
    gone = [words for words in listed if not any(words in reason for reason in taken)]
    assert not gone, f"{family} no longer takes a second way that tests/compat/fallbacks.py lists"


def test_what_is_listed_is_a_difference(recorded: Table) -> None:
    """A row that says nothing any more goes."""
    for family, (names, _) in DIFFERENCES.items():
        for name in names:
            values = recorded[family][name]
            assert len(set(values.values())) > 1 or len(values) == 1, f"{name} of {family} is the same everywhere"


def test_the_tables_are_of_the_66_families(recorded: Table) -> None:
    assert len(FAMILIES) == 66
    assert list(recorded) == list(FAMILIES)
    assert set(FALLBACKS) | set(DIFFERENCES) <= set(FAMILIES)
