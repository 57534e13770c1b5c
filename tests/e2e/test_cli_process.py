"""The command as a user runs it: a process of its own, a real checkpoint on disk, plain transformers as the judge."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from helpers.tiny import letters, write_llama
from unit.cli.test_commands import Run, one_line

PROMPT = "Hi there"
COMMAND = [sys.executable, "-c", "from lamina.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1]), "COLUMNS": "120"}


def cli(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        check=False,
        timeout=300,
    )


def done(*arguments: str, stdin: str | None = None) -> str:
    """What a command that must succeed wrote to stdout."""
    result = cli(*arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def refused(code: int, *arguments: str) -> str:
    """The one line of a command that must end with `code`."""
    result = cli(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("lamina: ")
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that never ends its answer by itself, and a tokenizer whose tokens are bytes."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = letters(chat_template=template)
    return write_llama(tmp_path_factory.mktemp("models") / "tiny", dtype=torch.bfloat16, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """What plain transformers continues the prompt with, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def decoded(folder: Path, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")


def test_run_continues_as_plain_transformers_does(folder: Path, expected: list[int]) -> None:
    answer = json.loads(done("run", str(folder), PROMPT, "--max-new-tokens", "8", "--json"))
    assert answer["tokens"] == expected
    assert answer["text"] == decoded(folder, expected)
    assert answer["stats"]["new_tokens"] == 8
    assert answer["stats"].keys() >= {
        "passes",
        "bytes_read",
        "new_tokens",
        "tokens_per_pass",
        "seconds_per_token",
        "seconds_waiting_for_disk",
        "peak_rss_bytes",
        "memory_budget_bytes",
        "resident_bytes",
    }


def test_the_text_streams_to_stdout_and_the_prompt_may_come_from_a_pipe(folder: Path, expected: list[int]) -> None:
    out = done("run", str(folder), "-n", "8", stdin=PROMPT + "\n")
    assert out == decoded(folder, expected) + "\n"


def test_token_ids_run_a_folder_without_a_tokenizer(
    run: Run, folder: Path, expected: list[int], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*", "special_tokens*"))
    prompt_ids = ",".join(map(str, ids))
    answer = run("run", str(bare), "--prompt-ids", prompt_ids, "-n", "8", "--json")
    assert json.loads(answer.out)["tokens"] == expected
    refusal = run("run", str(bare), PROMPT)
    assert (refusal.code, refusal.out) == (2, "")
    assert "tokenizer" in one_line(refusal)


def test_chat_answers_and_remembers(folder: Path) -> None:
    out = done("chat", str(folder), "-n", "4", "--system", "s", stdin="one\ntwo\n/exit\n")
    assert out.count("\n") >= 2


def test_plan_says_what_is_enough_and_less_is_refused(folder: Path) -> None:
    plan = json.loads(done("plan", str(folder), "--json"))
    assert plan.keys() >= {
        "model_bytes",
        "resident_bytes",
        "bytes_read_per_pass",
        "minimum_memory_bytes",
        "predicted_seconds_per_token",
        "units",
    }
    minimum = plan["minimum_memory_bytes"]
    assert done("plan", str(folder), "--memory", str(minimum))
    told = re.search(r"(\d+) bytes", refused(2, "run", str(folder), PROMPT, "--memory", str(minimum // 2)))
    assert told is not None
    assert done("run", str(folder), PROMPT, "-n", "2", "--memory", told[1])


def test_bench_reports_every_figure(run: Run, folder: Path) -> None:
    result = json.loads(run("bench", str(folder), "--prompt-tokens", "4", "--new-tokens", "3", "--json").out)
    assert len(result["tokens"]) == 3
    assert result.keys() >= {
        "seconds_per_token",
        "time_to_first_token_seconds",
        "load_seconds",
        "bytes_read_per_pass",
        "read_bytes_per_second",
        "disk_bytes_per_second",
        "disk_fraction",
        "tokens_per_pass",
        "peak_rss_bytes",
        "memory_budget_bytes",
        "resident_bytes",
        "model_bytes",
    }


def test_bench_writes_a_trace_and_nothing_else_to_stderr(run: Run, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ("bench", str(folder), "--prompt-tokens", "4", "--new-tokens", "3", "--profile", "--trace", str(trace))
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "computing" in result.stdout and str(trace) in result.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    trace.write_text("my notes")
    refusal = run(*arguments)
    assert (refusal.code, refusal.out) == (2, "")
    assert "trace.json" in one_line(refusal)
    assert trace.read_text() == "my notes"


def test_a_model_that_is_not_there_is_a_wrong_request(run: Run, tmp_path: Path) -> None:
    refusal = run("run", str(tmp_path / "no-such-model"), PROMPT, "--offline")
    assert (refusal.code, refusal.out) == (2, "")
    assert "no-such-model" in one_line(refusal)


def test_a_cut_off_file_is_a_failure_that_names_it(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "model.safetensors" in refused(1, "run", str(broken), PROMPT)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A run that goes on for a long time, and has begun to answer."""
    arguments = ["run", str(folder), PROMPT, "-n", "1000000", "--context", "2048"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.read(1), process.communicate()
    return process


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err.decode()


def test_ctrl_c_ends_a_run_with_one_line(folder: Path) -> None:
    process = start(folder)
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130
    assert [line for line in err.splitlines() if "stay in memory" not in line and "draft: " not in line] == [
        "lamina: interrupted"
    ]


def test_a_reader_that_goes_away_is_no_failure(folder: Path) -> None:
    process: Any = start(folder)
    process.stdout.close()
    process.stdout = None
    code, err = ended(process)
    assert code == 0
    assert "Traceback" not in err and "roken" not in err
