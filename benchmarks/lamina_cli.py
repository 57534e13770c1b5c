"""Lamina from outside, as its user has it: commands in processes of their own, their JSON, and what they cost.

Not a script: `streaming.py`, `memory.py` and `compare.py` measure through it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from capped import Run, run_capped
from report import MeasuringError

PROMPT_IDS = "1,17,404,25,8,99,123,31,77,5,248,63,9,51,300,42"


def command(*arguments: object) -> list[str]:
    """The command `lamina` of this interpreter's environment, wherever its script was installed."""
    return [sys.executable, "-c", "from lamina.cli.main import main; main()", *map(str, arguments)]


def cost(run: Run) -> dict[str, object]:
    """What a run took, as every results file spells it."""
    return {
        "failure": run.failure,
        "wall_seconds": round(run.wall_seconds, 3),
        "cap_bytes": run.limit_bytes if run.capped else None,
        "dropped_caches": run.dropped_caches,
        "cgroup_peak_bytes": run.peak_bytes,
        "cgroup_anonymous_bytes": run.peak_anonymous_bytes,
        "process_peak_bytes": run.peak_rss_bytes,
        "read_bytes": run.read_bytes,
        "cpu_seconds": round(run.cpu_seconds, 2),
        "oom_kills": run.oom_kills,
    }


def bench(
    checkpoint: Path, memory: int | None, new_tokens: int, *, cap: int | None = None, drop: bool = True
) -> dict[str, object]:
    """`lamina bench --json` on a folder: its figures, and what the run cost.

    Raises:
        MeasuringError: it failed; the message has its last line.
    """
    budget = ["--memory", memory] if memory else []
    asked = command("bench", checkpoint, *budget, "--prompt-ids", PROMPT_IDS, "--new-tokens", new_tokens, "--json")
    run = run_capped(asked, cap, drop=drop)
    if run.failure:
        raise MeasuringError(f"lamina bench {checkpoint} --memory {memory}: {run.failure}")
    return cost(run) | run.last_json()


def prompt_of(tokens: int) -> str:
    """Token ids of a prompt of this length, for `--prompt-ids`: any vocabulary of 10,000 has them."""
    return ",".join(str(5 + each * 37 % 9973) for each in range(tokens))


def generate(
    checkpoint: Path,
    memory: int,
    new_tokens: int,
    more: Sequence[object],
    *,
    cap: int | None,
    timeout: float,
    prompt: str = PROMPT_IDS,
) -> dict[str, object]:
    """`lamina run --json` on a folder: tokens, stats, and what the run cost; a failure is in the result.

    Args:
        prompt: token ids, or words.
    """
    given = ["--prompt-ids", prompt] if prompt.replace(",", "").isdigit() else [prompt]
    asked = [*given, "--memory", memory, "--max-new-tokens", new_tokens, "--json", *more]
    run = run_capped(command("run", checkpoint, *asked), cap, timeout=timeout)
    said = run.last_json() if run.failure is None else {}
    stats = said.get("stats")
    return cost(run) | {"tokens": said.get("tokens"), "stats": stats if isinstance(stats, dict) else {}}


def plan(checkpoint: Path, more: Sequence[object] = ()) -> dict[str, object]:
    """`lamina plan --json` on a folder."""
    asked = command("plan", checkpoint, *more, "--json")
    run = subprocess.run(asked, capture_output=True, text=True)
    if run.returncode:
        raise MeasuringError(f"lamina plan {checkpoint}: {run.stderr.strip()[-200:]}")
    return dict(json.loads(run.stdout))


def number(line: dict[str, object], key: str) -> float:
    """A figure that has to be there."""
    value = line.get(key)
    if not isinstance(value, int | float):
        raise MeasuringError(f"lamina did not report {key}, but {sorted(line)}")
    return value
