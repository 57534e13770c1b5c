"""`--draft` on the command line: a real tiny model within this process, what is printed, told and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.tiny import write_llama
from lamina.cli import report
from lamina.speculative.draft_length import DraftLength
from unit.cli.test_commands import Result, Run, one_line

pytestmark = pytest.mark.usefixtures("steadily")

PROMPT = "5,9,23,17,5,9,23,17,5,9"
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 32 tokens: what it says soon repeats, and a lookup is right."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    return write_llama(folder, vocab_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0)


def done(result: Result) -> Any:
    """The object on stdout."""
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    return json.loads(result.out)


def asked(folder: Path, *more: str) -> list[str]:
    return [str(folder), "--prompt-ids", PROMPT, "-n", str(NEW), "--device", "cpu", "--context", "64", *more]


def test_help_says_what_there_is(run: Run) -> None:
    for command in ("run", "chat", "plan", "bench"):
        text = " ".join(run(command, "--help").out.split())
        assert "--draft" in text
        for word in ("none", "auto", "lookup", "self", "smaller model"):
            assert word in text[text.index("--draft") :][:500], (command, word)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is proposed is verified: how quick this machine is decides nothing."""
    monkeypatch.setattr(DraftLength, "worth", lambda self, confidence: len(confidence))
    monkeypatch.setattr(DraftLength, "_judge", lambda self: None)


@pytest.mark.usefixtures("always")
def test_what_a_drafted_answer_tells(run: Run, folder: Path) -> None:
    plain = done(run("run", *asked(folder, "--draft", "none", "--json")))
    drafted = done(run("run", *asked(folder, "--draft", "lookup", "--json")))
    assert drafted["tokens"] == plain["tokens"]
    stats = drafted["stats"]
    assert (stats["draft"], stats["draft_reason"]) == ("lookup", "asked for")
    assert 0 < stats["accepted_tokens"] <= stats["drafted_tokens"]
    assert stats["tokens_per_pass"] > 1.2
    assert stats["passes"] < NEW
    assert stats["draft_bytes"] > 0
    assert 0 < stats["draft_share_of_time"] < 1
    assert all(0 <= share <= 1 for share in stats["accepted_by_position"])
    without = plain["stats"]
    assert (without["draft"], without["drafted_tokens"], without["passes"]) == ("none", 0, NEW)
    assert without["draft_bytes"] == 0


@pytest.mark.usefixtures("always")
def test_the_summary_shows_drafted_tokens(run: Run, folder: Path) -> None:
    result = run("run", *asked(folder, "--draft", "lookup"))
    assert result.code == 0
    assert "drafted were right (lookup)" in result.err
    assert "of the time drafting" in result.err
    assert "tokens a pass" in result.err
    without = run("run", *asked(folder, "--draft", "none"))
    assert without.code == 0
    assert "draft" not in without.err


def test_the_default_says_what_it_found(run: Run, folder: Path) -> None:
    result = run("run", *asked(folder))
    assert "draft: lookup" in result.err
    assert "--draft self writes one" in result.err


@pytest.mark.parametrize("command", ["run", "bench", "plan"])
def test_a_draft_that_is_not_there(run: Run, folder: Path, command: str) -> None:
    more = ["--prompt-ids", PROMPT] if command == "run" else []
    result = run(command, str(folder), *more, "--draft", str(folder.parent / "nonsense"))
    assert result.code == 2
    assert result.out == ""
    assert "nonsense" in one_line(result)


def test_a_draft_with_other_tokens(run: Run, folder: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "other", vocab_size=48, hidden_size=32, num_hidden_layers=1)
    result = run("run", *asked(folder, "--draft", str(tmp_path / "other"), "--json"))
    assert result.code == 2
    assert result.out == ""
    assert "has 48 tokens and the model 32" in one_line(result)


def test_bench_with_a_draft(run: Run, folder: Path) -> None:
    arguments = [str(folder), "--prompt-tokens", "8", "--new-tokens", "12", "--device", "cpu", "--json"]
    record = done(run("bench", *arguments, "--draft", "lookup"))
    assert record["draft"] == "lookup"
    assert record["draft_reason"] == "asked for"
    assert record["draft_bytes"] > 0
    assert record.keys() >= {
        "seconds_per_token",
        "tokens_per_pass",
        "drafted_tokens",
        "accepted_tokens",
        "accepted_by_position",
        "draft_share_of_time",
        "disk_fraction",
        "tokens",
    }
    assert record["seconds_per_token"] > 0
    plain = done(run("bench", *arguments))
    assert plain["draft"] == "none"  # nothing proposes unless it is named
    assert plain["drafted_tokens"] == 0
    assert record["tokens"] == plain["tokens"]


def test_a_plan_before_a_copy_is_written(run: Run, folder: Path) -> None:
    plan = done(run("plan", str(folder), "--draft", "self", "--device", "cpu", "--context", "64", "--json"))
    assert plan["draft_bytes"] > 0
    assert plan["draft"] == "self"
    without = done(run("plan", str(folder), "--draft", "none", "--device", "cpu", "--context", "64", "--json"))
    assert without["draft_bytes"] == 0
    assert plan["minimum_memory_bytes"] == without["minimum_memory_bytes"] + plan["draft_bytes"]
    assert [each.name for each in folder.parent.iterdir()] == ["tiny"]


def test_a_copy_is_announced_in_a_line(run: Run, folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    result = run("run", *asked(model, "--draft", "self", "--json"))
    assert done(result)["stats"]["draft"] == "self"
    first = result.err.splitlines()[0]
    assert first.startswith(f"lamina: writing a copy of the model in 4 bits for drafting: {model}-4bit, ")
    assert ", about " in first and first.endswith(" s")
    assert "writing" not in run("run", *asked(model, "--draft", "self", "--json")).err
    shutil.rmtree(f"{model}-4bit")
    assert "writing" not in run("run", *asked(model, "--draft", "self", "--json", "--quiet")).err


def test_a_copy_is_refused_in_a_line_and_nothing_is_left(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    result = run("run", *asked(model, "--draft", "self", "--memory", "1MB"))
    assert result.code == 2
    assert "needs at least" in one_line(result)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    result = run("run", *asked(model, "--draft", "self"))
    assert result.code == 1
    assert "take --draft lookup or --draft none, which write nothing" in one_line(result)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


# -- the lines themselves

STATS: dict[str, Any] = {
    "tokens_per_pass": 4.0,
    "drafted_tokens": 50,
    "accepted_tokens": 45,
    "draft": "self",
    "draft_share_of_time": 0.25,
    "draft_bytes": 2_000_000_000,
    "draft_reason": "asked for",
}


def test_the_summary_counts_what_was_right() -> None:
    line = report.summary(STATS, 60)
    assert "4.00 tokens a pass" in line
    assert "45 of 50 drafted were right (self), 25% of the time drafting" in line
    assert "drafted" not in report.summary({**STATS, "drafted_tokens": 0}, 60)
    assert "tried again" not in line and "2 reads were refused" in report.summary({**STATS, "read_retries": 2}, 60)


def test_the_line_about_the_draft() -> None:
    line = report.drafting(STATS)
    assert line.startswith("draft: self, 2")
    assert line.endswith("asked for")
    assert report.drafting({**STATS, "draft": "none"}) == ""
    assert report.drafting({}) == ""
