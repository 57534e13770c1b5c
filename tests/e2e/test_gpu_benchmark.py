"""`benchmarks/gpu.py` runs dry on the processor: its stages end, are written down, and are not run twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_stages_run_dry_and_only_once(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    common = ["--out", out, "--device", "cpu", "--shape", "tiny", "--folder", tmp_path / "made"]
    command = [sys.executable, SCRIPT, "env", "stale", "parity", "capped", *common]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    ends = {line["stage"]: line["passed"] for line in lines if "took_seconds" in line}
    assert ends == dict.fromkeys(["env", "stale", "parity", "capped"], True)
    families = [line for line in lines if "family" in line]
    assert len(families) == 8 and all(line["bit_equal"] for line in families)
    assert any("skipped" in line for line in lines if line["stage"] == "stale")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout.count("passed before") == 4
    assert out.read_text().count("\n") == len(lines)


def test_a_stage_that_fails_is_written_down_as_failed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    common = ["--out", out, "--device", "cpu", "--shape", "tiny", "--folder", tmp_path / "made"]
    ran = subprocess.run([sys.executable, SCRIPT, "env", "--limit", "1", *common], capture_output=True, text=True)
    end = json.loads(out.read_text().splitlines()[-1])
    assert ran.returncode == 1 and not end["passed"] and end["why"] == "stopped after 1 s"
    assert "env: FAILED: stopped after 1 s" in ran.stdout
