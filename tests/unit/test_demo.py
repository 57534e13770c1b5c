"""The demonstration ends with commands that work as they stand, and its peaks are said in words."""

from __future__ import annotations

import importlib.util
import io
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.cli_double import Library
from lamina.cli import library
from lamina.cli.main import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_to_try_are_well_formed(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    double = Library()
    monkeypatch.setattr(library, "library", lambda options: double)
    commands = demo.nexts(628_830_592)
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert Path(program).name == "lamina"
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code, command
    assert [opened.get("memory") for opened in double.opened] == [629_000_000, None, 629_000_000]


def test_both_peaks_are_explained(demo: ModuleType) -> None:
    told = " ".join(demo.explained(629_000_000, 386_000_000))
    assert "386 MB" in told and "629 MB" in told and "the last line" in told
    assert "none" in " ".join(demo.explained(629_000_000, None))
