"""The documents say what the code does: commands parse, links lead somewhere, the version is one."""

from __future__ import annotations

import graphlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
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
SOURCES = ROOT / "src" / "lamina"
HISTORY = ("CHANGELOG.md", "log.md")  # what they name was there at their time
OF_NOW = [page for page in (*PAGES, ROOT / "benchmarks" / "README.md") if page.name not in HISTORY]
OF_THE_CODE = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in ("architecture", "glossary"))]
OF_THE_CODE.append(ROOT / "docs" / "how-it-works.md")
FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]*|\w+\.(?:py|c)")
NOT_IN_GIT = {".cache", ".venv"}
IN_STORES = {"lamina.json", "lamina.padding", "lamina.split.jsonl"}  # names within stores: docs/store-format.md


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


def code_in(page: Path) -> Iterator[str]:
    """What stands in backticks or fenced blocks."""
    text = page.read_text()
    yield from fenced_lines(page)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def files_named(page: Path) -> set[str]:
    """The files and folders of this repository that a page names in its code."""
    folders = {path.name for start in (ROOT, SOURCES) for path in start.iterdir() if path.is_dir()} - NOT_IN_GIT
    words = {word for line in code_in(page) for word in re.split(r"[\s'\"(),;:=]+", line) if FILE.fullmatch(word)}
    return {word for word in words if "/" not in word or word.split("/")[0] in folders}


def is_there(name: str) -> bool:
    """Whether the repository has that file: from its root, from src/lamina, or anywhere where it has no folder."""
    if "/" not in name:
        return any(path for folder in ("src", "tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob(name))
    return any((start / name).exists() for start in (ROOT, ROOT / "src", SOURCES))


@pytest.mark.parametrize("page", OF_NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_named_is_there(page: Path) -> None:
    assert [name for name in sorted(files_named(page)) if not is_there(name)] == []


@pytest.mark.parametrize("page", OF_NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_dotted_name_of_lamina_is_there(page: Path) -> None:
    names = {name for line in code_in(page) for name in re.findall(r"(?<![\w./-])lamina(?:\.[A-Za-z_]\w*)+", line)}
    for name in sorted(names - IN_STORES):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", OF_THE_CODE, ids=lambda page: page.name)
def test_every_class_named_is_in_the_sources(page: Path) -> None:
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))))
    named = {text for text in code_in(page) if re.fullmatch(r"[A-Z]\w*[a-z]\w*", text)}
    assert named - words == set()


def test_files_that_are_not_there_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`plan/planner.py`, `plan/no.py`, `src/lamina/no/`, `no.py`, `org/model.json`, `api.py`, plan/text.py\n"
        "```\npython scripts/no.sh; scripts/test 'tests/conftest.py::test'\n```\n"
    )
    assert {name for name in files_named(page) if not is_there(name)} == {
        "plan/no.py",
        "src/lamina/no/",
        "no.py",
        "scripts/no.sh",
    }


def rooms() -> Any:
    """scripts/rooms.py as a module."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "scripts" / "rooms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "rooms.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_page_on_models_is_that_of_what_was_found() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "models_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_room_has_one_row_that_says_what_it_is_for() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| \S", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(rooms().rooms())


def test_the_rooms_are_read_from_every_kind_of_import(tmp_path: Path) -> None:
    sources = tmp_path / "lamina"
    for name, text in {
        "__init__.py": "from lamina.top import a",
        "errors.py": "",
        "top/__init__.py": "",
        "top/a.py": "import importlib\ndef later():\n    importlib.import_module('lamina.middle.b')",
        "middle/__init__.py": "",
        "middle/b.py": "from lamina.errors import Some\nif TYPE_CHECKING:\n    import lamina.low.c",
        "low/__init__.py": "",
        "low/c.py": "from lamina import errors",
        "middle/inner/__init__.py": "",
        "middle/inner/d.py": "from lamina.middle import b",
    }.items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(text)
    module = rooms()
    graph = module.rooms(sources)
    assert graph == {
        "top": {"middle"},
        "middle.inner": {"middle"},
        "middle": {"low", "base"},
        "low": {"base"},
        "base": set(),
    }
    assert "    middle --> base" not in module.text(graph)  # through low
    assert "| middle | low, base |" in module.text(graph)
    (sources / "low" / "c.py").write_text("import lamina.top.a")
    with pytest.raises(graphlib.CycleError):
        module.rooms(sources)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


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
