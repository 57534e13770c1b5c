"""The least memory that is stated: the same in every process, but for what a process holds besides, which is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lamina
from helpers.families import write_tiny

SCRIPT = """
import json, sys
{before}
import lamina
folder = sys.argv[1]

def refused():
    try:
        lamina.AutoModel.from_pretrained(folder, memory=1, device="cpu", context=64, draft=None)
    except lamina.BudgetError as error:
        return {{"least": error.minimum_bytes, "text": str(error)}}

told = [refused()]
{between}
told.append(refused())
plan = lamina.plan_model(folder, device="cpu", context=64, draft=None).as_dict()
print(json.dumps({{"told": told, "plan": plan}}))
"""
USED = """
model = lamina.AutoModel.from_pretrained(folder, device="cpu", context=64, draft=None)
with model.lamina:
    model.generate(__import__("torch").tensor([[1, 2, 3]]), max_new_tokens=4)
del model
"""
MB = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_tiny("llama", path)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}


def process(folder: Path, before: str = "", between: str = "") -> dict[str, Any]:
    """What a process of its own is told, before and after `between`."""
    script = SCRIPT.format(before=before, between=between)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def fresh(folder: Path) -> dict[str, Any]:
    return process(folder)


def test_a_fresh_process_holds_nothing_besides(fresh: dict[str, Any]) -> None:
    assert fresh["plan"]["already_held_bytes"] == 0
    assert fresh["plan"]["overhead_bytes"] == 440 * MB
    first, second = fresh["told"]
    assert first == second
    assert "already holds" not in first["text"]
    assert first["least"] == fresh["plan"]["minimum_memory_bytes"]


@pytest.mark.parametrize("before", ["import torch, transformers", "import transformers.generation, tokenizers"])
def test_libraries_that_lamina_needs_are_no_difference(folder: Path, fresh: dict[str, Any], before: str) -> None:
    assert process(folder, before)["told"] == fresh["told"]


def test_a_model_that_was_here_before_is_no_difference(folder: Path, fresh: dict[str, Any]) -> None:
    kept = USED.replace("del model", "kept = model")
    assert process(folder, between=USED + "told.append(refused())" + kept)["told"] == [*fresh["told"], fresh["told"][0]]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_data_of_others_counts_and_is_said(folder: Path, fresh: dict[str, Any]) -> None:
    for result in (
        process(folder, "held = bytearray(b'x') * 300_000_000"),
        process(folder, between="held = bytearray(b'x') * 300_000_000"),
    ):
        told, plan = result["told"][-1], result["plan"]
        held = plan["already_held_bytes"]
        assert 150 * MB < held <= 350 * MB
        least = fresh["told"][0]["least"]
        assert told["least"] == least + held == plan["minimum_memory_bytes"]
        assert "are for what this process already holds besides (other libraries or data)" in told["text"]
        assert f"a process without it needs {least} bytes" in told["text"]


def test_the_command_line_holds_nothing_besides(folder: Path, fresh: dict[str, Any]) -> None:
    command = [sys.executable, "-c", "from lamina.cli.main import main; main()", "plan", str(folder)]
    options = ["--device", "cpu", "--context", "64", "--draft", "none", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment(), timeout=300)
    plan = json.loads(done.stdout)
    assert plan["already_held_bytes"] == 0
    assert plan["minimum_memory_bytes"] == fresh["plan"]["minimum_memory_bytes"]
