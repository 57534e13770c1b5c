"""A conversation remembers, forgets when told, and survives an answer that is stopped."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import lamina
from helpers.cli_double import Library
from helpers.pseudo_terminal import Terminal
from lamina.cli import library as engine
from lamina.cli import lines
from lamina.cli.main import main
from lamina.errors import BudgetError, ReadError, RequestError


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


def test_the_oldest_turns_give_way_and_the_system_prompt_stays(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "".join(f"question {number}\n" for number in range(4))
    assert talk(monkeypatch, said, "--system", "s", "--context", "80", "-n", "3") == 0
    prompts = library.model.prompts
    assert prompts[0] == "system:s|user:question 0"
    assert prompts[1] == "system:s|user:question 0|assistant:yes|user:question 1"
    assert prompts[2] == "system:s|user:question 1|assistant:yes|user:question 2"
    assert prompts[3] == "system:s|user:question 2|assistant:yes|user:question 3"
    err = capsys.readouterr().err
    assert err.count("lamina: the oldest turn was dropped to make room (/reset forgets the whole conversation)") == 2


def test_a_message_longer_than_the_context_is_one_line_and_nothing_is_forgotten(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, f"one\n{'long' * 30}\ntwo\n", "--context", "60", "-n", "3") == 0
    assert library.model.prompts == ["user:one", "user:one|assistant:yes|user:two"]
    assert "lamina: this message takes 125 tokens, the context has 60: shorten it, or" in capsys.readouterr().err


def test_turns_that_the_memory_has_no_room_for_give_way_as_well(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(index: int) -> None:
        if len(library.model.prompts[-1]) > 40:
            raise BudgetError("too small", minimum_bytes=1)

    library.model.before_token = full
    assert talk(monkeypatch, f"one\ntwo\nthree\n{'long' * 30}\nfour\n") == 0
    assert library.model.prompts[2:4] == [
        "user:one|assistant:yes|user:two|assistant:yes|user:three",
        "user:two|assistant:yes|user:three",
    ]
    assert library.model.prompts[-1] == "user:three|assistant:yes|user:four", "what was not answered is forgotten"
    err = capsys.readouterr().err
    assert err.count("the oldest turn was dropped") == 2
    assert err.count("lamina: too small") == 1


@pytest.mark.parametrize("word", ["quit", "exit", "/bye", "/exit", "/quit", "bye", "Exit"])
def test_a_word_ends_the_chat(library: Library, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    assert talk(monkeypatch, f"one\n{word}\nnever\n") == 0
    assert library.model.prompts == ["user:one"]


@pytest.mark.parametrize("end", ['three"""\n', 'three\n"""\n', "three"])
def test_what_stands_between_quotes_is_one_message(library: Library, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    assert talk(monkeypatch, f'"""one\n\n  /bye\n{end}') == 0
    assert library.model.prompts == ["user:one\n\n  /bye\nthree"]


def test_the_summary_is_of_this_answer_alone(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("lamina.cli.live.now", lambda: clock[0])

    def slow_at_first(index: int) -> None:
        first = len(library.model.prompts) == 1
        clock[0] += 10.0 if first else 2.0
        stats = library.model.lamina.stats
        read, waited = stats.bytes_read + 4_000_000, stats.seconds_waiting_for_disk + (9.0 if first else 1.0)
        library.model.lamina.stats = replace(stats, bytes_read=read, seconds_waiting_for_disk=waited)

    library.model.before_token = slow_at_first
    assert talk(monkeypatch, "one\ntwo\n") == 0
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("3 tokens"))
    assert "10 s/token" in first and "400 kB/s · 27.0 s waiting" in first
    assert "2 s/token" in second and "2.00 MB/s · 3.0 s waiting" in second


AT_A_TERMINAL = """
import sys
sys.path[:0] = [TESTS]
from helpers.cli_double import Library, Model
from lamina.cli import library as engine
from lamina.cli.main import main

class Echo(Model):
    def generate(self, *, input_ids, **kwargs):
        said = bytes(input_ids[0].tolist()).decode().rpartition("user:")[2]
        self.answer = "<" + said.replace("\\n", "|") + ">"
        super().generate(input_ids=input_ids, **kwargs)

double = Library(Echo())
engine.library = lambda options: double
main(["chat", "m"])
"""


def test_what_is_pasted_at_a_terminal_is_one_message() -> None:
    program = AT_A_TERMINAL.replace("TESTS", repr(str(Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])}
    with Terminal([sys.executable, "-c", program], environment) as terminal:
        terminal.expect("> ")
        if "\x1b[?2004h" in terminal.screen:  # readline marks a paste
            terminal.type("\x1b[200~one\n\n  two\nexit\n\x1b[201~\r")
            terminal.expect("<one||  two|exit>")
            terminal.expect("> ")
        terminal.type("one\n\n  two\nthree\n")  # a terminal that does not mark it
        terminal.expect("<one||  two|three>")
        terminal.expect("> ")
        terminal.type("hello\n/reset\n")
        terminal.expect("<hello>")
        terminal.expect("forgotten")
        terminal.expect("> ")
        terminal.type("/image no picture.png\nseven\n")
        terminal.expect("there is no picture no picture.png")
        terminal.expect("<seven>")
        terminal.expect("> ")
        terminal.type('"""four\n')
        terminal.expect(". ")
        terminal.type('five\n"""\n')
        terminal.expect("<four|five>")
        terminal.expect("> ")
        terminal.type('"""six\n')
        terminal.expect(". ")
        terminal.type("\x03")
        terminal.expect("> ")
        terminal.type("last\nquit\n")
        terminal.expect("<last>")
        assert terminal.end() == 0


def test_ctrl_c_takes_back_what_is_typed_and_ends_the_chat_where_nothing_is() -> None:
    program = AT_A_TERMINAL.replace("TESTS", repr(str(Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])}
    with Terminal([sys.executable, "-c", program], environment) as terminal:
        terminal.expect("> ")
        # readline knows what is typed; a Ctrl-C that comes while it works on a key is heard as well
        for _ in range(10 if "\x1b[?2004h" in terminal.screen else 0):
            terminal.type("half a")
            terminal.expect("half a")
            terminal.type("\x03")
            terminal.expect("> ")
        terminal.type("whole\n")
        terminal.expect("<whole>")
        terminal.expect("> ")
        terminal.type("\x03")
        terminal.expect("lamina: interrupted")
        assert terminal.end() == 130
    assert "Traceback" not in terminal.screen


@pytest.mark.skipif(not hasattr(signal, "SIGWINCH"), reason="a wait for keys cannot be interrupted here")
def test_a_wait_for_keys_is_interrupted_after_ctrl_c() -> None:
    """CPython hears a Ctrl-C that comes just before readline waits only when that wait is interrupted."""
    nudged = threading.Event()
    before = [signal.signal(signal.SIGINT, lambda *_: None), signal.signal(signal.SIGWINCH, lambda *_: nudged.set())]
    threads = threading.active_count()
    try:
        with lines._heard():
            assert not nudged.wait(0.2), "without Ctrl-C there is nothing to hear"
            signal.raise_signal(signal.SIGINT)
            assert nudged.wait(60)
        assert threading.active_count() == threads
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGWINCH, before[1] or signal.SIG_DFL)


def test_a_failure_ends_the_chat(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(index: int) -> None:
        raise ReadError("the disk is gone")

    library.model.before_token = fail
    assert talk(monkeypatch, "one\ntwo\n") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "lamina: the disk is gone"
    assert library.model.lamina.closed
