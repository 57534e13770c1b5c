"""`lamina split` and `lamina verify`: what reaches the library, what comes out, and with which exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import families
from lamina.cli import library
from lamina.cli.live import StatusLine
from lamina.cli.main import main
from lamina.errors import ChangedError, RequestError, WriteError


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


class Store:
    """A double of `lamina.store`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.stages: list[tuple[str, int, int]] = [("split", 0, 100), ("split", 100, 100)]
        self.made: dict[str, Any] = {
            "folder": "/models/m-4bit",
            "compression": "4bit",
            "source_bytes": 1_000_000_000,
            "bytes": 290_000_000,
            "files": 34,
            "files_kept": 0,
            "seconds": 12.5,
            "deleted": (),
            "kept": {},
        }
        self.checked: dict[str, Any] = {
            "folder": "/models/m-4bit",
            "compression": "4bit",
            "files": 35,
            "bytes": 290_000_000,
            "faults": [],
            "small_files": 5,
        }

    def split(self, model: str, *, progress: Any, **kwargs: Any) -> dict[str, Any]:
        self.calls.append({"model": model, **kwargs})
        print("a library prints to stdout")
        for stage in self.stages:
            progress(*stage)
        if self.error is not None:
            raise self.error
        return self.made

    def verify(self, folder: str, *, progress: Any) -> dict[str, Any]:
        self.calls.append({"folder": folder})
        progress("verify", 1, 2)
        if self.error is not None:
            raise self.error
        return self.checked


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    double = Store()
    monkeypatch.setattr(library, "store_library", lambda options: double)
    return double


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_split_writes_the_folder_to_stdout_and_the_summary_to_stderr(run: Run, store: Store) -> None:
    result = run("split", "m", "--compression", "4bit", "--to", "d", "--delete-original", "--gguf-file", "a")
    assert result.code == 0 and result.out == "/models/m-4bit\n"
    asked = {"model": "m", "to": "d", "compression": "4bit", "delete_original": True, "gguf_file": "a"}
    assert store.calls == [asked]
    assert "1.00 GB became 290 MB (29.0%) · 34 files · 12.5 s" in result.err


def test_split_without_options_asks_for_the_defaults(run: Run, store: Store) -> None:
    run("split", "m", "--offline", "--quiet")
    asked = {"model": "m", "to": None, "compression": None, "delete_original": False, "local_files_only": True}
    assert store.calls == [asked]


def test_split_as_json_is_one_object(run: Run, store: Store) -> None:
    answer = json.loads(run("split", "m", "--json").out)
    assert answer["bytes"] == 290_000_000 and answer["folder"] == "/models/m-4bit"


def test_what_was_there_and_what_was_kept_is_said(run: Run, store: Store) -> None:
    store.made |= {"files_kept": 34, "kept": {"/m/model.safetensors": "is a link to /x"}}
    err = run("split", "m", "--delete-original").err
    assert "34 were there already" in err and " s\n" not in err
    assert "kept: /m/model.safetensors is a link to /x" in err


def test_waiting_for_another_process_is_said_once(run: Run, store: Store) -> None:
    store.stages = [("wait", 0, 0)] * 3
    assert run("split", "m").err.count("another process writes the same folder") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(RequestError("wrong"), 2), (WriteError("full"), 1), (ChangedError("changed"), 1)], ids=str
)
def test_an_error_is_one_line_and_an_exit_code(run: Run, store: Store, error: BaseException, code: int) -> None:
    store.error = error
    result = run("split", "m")
    assert result.code == code and f"lamina: {error}\n" in result.err and result.out == ""


def test_a_wrong_compression_is_refused_before_anything_is_loaded(run: Run, store: Store) -> None:
    result = run("split", "m", "--compression", "5bit")
    assert result.code == 2 and not store.calls
    assert "there is no compression '5bit': choose one of 8bit, 4bit, lossless" in result.err


def test_ctrl_c_says_that_it_goes_on(run: Run, store: Store) -> None:
    store.error = KeyboardInterrupt()
    result = run("split", "m")
    assert result.code == 130 and "run the same command again" in result.err and "lamina: interrupted" in result.err


def test_verify_says_that_all_is_well(run: Run, store: Store) -> None:
    result = run("verify", "d")
    assert result.code == 0 and result.out == "" and "35 files, 290 MB (4bit): all as written" in result.err
    assert store.calls == [{"folder": "d"}]


def test_verify_says_what_it_could_not_compare(run: Run, store: Store) -> None:
    assert "not compared" not in run("verify", "d").err
    store.checked["small_files"] = None
    result = run("verify", "d")
    assert result.code == 0 and "config and tokenizer were not compared" in result.err


def test_verify_names_each_bad_file(run: Run, store: Store) -> None:
    store.checked["faults"] = [{"file": "a", "what": "is short"}, {"file": "b", "what": "differs"}]
    result = run("verify", "d")
    assert result.code == 1 and result.out == "a is short\nb differs\n"
    assert "lamina: 2 of 35 files in /models/m-4bit are damaged" in result.err


def test_verify_as_json(run: Run, store: Store) -> None:
    store.checked["faults"] = [{"file": "a", "what": "is short"}]
    result = run("verify", "d", "--json")
    assert result.code == 1 and json.loads(result.out)["faults"] == [{"file": "a", "what": "is short"}]


def test_run_verifies_first_where_it_is_asked_to(run: Run, store: Store) -> None:
    store.checked["faults"] = [{"file": "a", "what": "is short"}]
    result = run("run", "/models/m-4bit", "Hi", "--verify")
    assert result.code == 1 and "1 of 35 files in /models/m-4bit is damaged (a is short)" in result.err
    assert store.calls == [{"folder": "/models/m-4bit"}]


def test_the_rate_of_a_resumed_split_counts_what_this_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 20.0])
    monkeypatch.setattr("lamina.cli.live.now", lambda: next(clock))
    progress = StatusLine(1)
    progress.report("split", 600_000_000, 1_000_000_000)
    progress.report("split", 800_000_000, 1_000_000_000)
    parts = progress.describe()
    assert parts == ["splitting 80%", "800 MB of 1.00 GB", "20.0 MB/s", "10 s left"]


def test_the_real_command_splits_and_verifies(tmp_path: Path) -> None:
    families.write_tiny("llama", tmp_path / "model")
    code = "from lamina.cli.main import main; main()"

    def lamina(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)

    made = lamina("split", str(tmp_path / "model"), "--compression", "8bit")
    assert (made.returncode, made.stdout) == (0, f"{tmp_path / 'model-8bit'}\n"), made.stderr
    shard = tmp_path / "model-8bit" / "model-00001-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    checked = lamina("verify", str(tmp_path / "model-8bit"))
    assert checked.returncode == 1 and checked.stdout.startswith(f"{shard.name} has other bytes"), checked.stderr
    assert checked.stderr.count("\n") == 1
