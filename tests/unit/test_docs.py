"""The documents say what the code does: commands parse, links lead somewhere, the version is one."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import lamina
from compat.differences import DIFFERENCES
from compat.fallbacks import FALLBACKS
from lamina.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def fenced_lines(page: Path) -> Iterator[str]:
    """The lines of fenced blocks, continued ones joined and a shell prompt taken off."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from (line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())


COMMANDS = [(page.name, line) for page in PAGES for line in fenced_lines(page) if line.startswith("lamina ")]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_shown_is_a_command_there_is(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    for operator in ("|", ">", ">>", "<", "&&", "2>"):
        if operator in words:
            words = words[: words.index(operator)]
    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        options = {name for parameter in group.params for name in parameter.opts} | {"--help", "-h"}
        assert words[0] in options, line
        return
    assert words[0] in group.commands, line
    if "--help" not in words:
        group.commands[words[0]].make_context(words[0], words[1:]).close()


def test_the_readme_shows_a_command() -> None:
    assert any(page == "README.md" for page, _ in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## \[?(\d\S*?)\]?(\s|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"] == lamina.__version__ == newest[1]


def test_the_dependencies_page_names_every_dependency_and_its_range() -> None:
    page = (ROOT / "docs/dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, lower, upper = re.fullmatch(r"([\w-]+)(>=[\d.]+),(<[\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert f"| {name} | {lower}, {upper} |" in page, requirement
    for extra in project["optional-dependencies"]:
        assert f"| `{extra}` |" in page


def test_the_page_on_versions_has_the_tables_that_the_tests_have() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for family, reasons in FALLBACKS.items():
        said = " ".join(row for row in rows if family in re.split(r"[ |,]+", row))
        assert all(words.removeprefix("is off: ") in said for words in reasons if "no cache that can" not in words), (
            family
        )
    for family, difference in DIFFERENCES.items():
        (row,) = [row for row in rows if row.startswith(f"| {family} | {', '.join(difference.figures)} |")]
        assert difference.because in row
    assert f"The other {66 - len(FALLBACKS)} of the 66 families take none" in page
