"""A conversation remembers, forgets when told, and survives an answer that is stopped."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from cli_double import Library
from lamina.cli import engine
from lamina.cli.main import main
from lamina.errors import ReadError, RequestError


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    double = Library()
    double.model.answer = "yes"
    monkeypatch.setattr(engine, "library", lambda options: double)
    return double


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as ended:
        main(["chat", "m", *arguments])
    return int(ended.value.code or 0)


def test_what_was_said_is_part_of_the_next_question(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "one\n\ntwo\n", "--system", "be brief") == 0
    assert library.model.prompts == [
        "system:be brief|user:one",
        "system:be brief|user:one|assistant:yes|user:two",
    ]
    assert capsys.readouterr().out.splitlines()[-2:] == ["yes", "yes"]
    assert library.model.lamina.closed


def test_reset_forgets_all_but_the_system_prompt(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(monkeypatch, "one\n/reset\ntwo\n", "--system", "s")
    assert library.model.prompts[-1] == "system:s|user:two"


def test_commands_are_not_questions(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "/help\n/what\n/exit\nnever\n") == 0
    assert library.model.prompts == []
    err = capsys.readouterr().err
    assert "/reset" in err
    assert "no command /what" in err


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.model.before_token = lambda index: signal.raise_signal(signal.SIGINT) if index == 1 else None
    before = signal.getsignal(signal.SIGINT)
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert library.model.prompts[-1] == "user:one|assistant:ye|user:two"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_it_at_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(index: int) -> None:
        if index == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    library.model.before_token = twice
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert library.model.prompts[-1] == "user:one|assistant:y|user:two"


def test_a_question_that_cannot_be_answered_is_forgotten(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(index: int) -> None:
        library.model.before_token = lambda index: None
        raise RequestError("longer than the context")

    library.model.before_token = refuse
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert library.model.prompts[-1] == "user:two"
    assert "lamina: longer than the context" in capsys.readouterr().err


def test_a_failure_ends_the_chat(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(index: int) -> None:
        raise ReadError("the disk is gone")

    library.model.before_token = fail
    assert talk(monkeypatch, "one\ntwo\n") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "lamina: the disk is gone"
    assert library.model.lamina.closed
