"""Lamina beside AirLLM, accelerate's disk offload and llama.cpp, on one checkpoint under one memory cap.

    benchmarks/peers.sh .cache/peers
    python benchmarks/first_reading.py --peers .cache/peers --rounds 3               # needs root for the cap

The engines take turns, so that a slow spell of the disk meets all of them; the page cache is dropped before each run
and counts against the cap. Same weights, same prompt ids, greedy, no early end. One JSON line per run goes to
benchmarks/results/first_reading.jsonl; the table shows medians, spread and the ratio to Lamina; the last line is JSON.
"disk/s" is what the drive gave raw, right before each run; "same" is how many first tokens agree with Lamina's.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from capped import run_capped
from disk import rate_now
from lamina_cli import cost
from report import (
    BENCH,
    HERE,
    MeasuringError,
    gigabytes,
    make_checkpoint,
    parse_size,
    record,
    run_main,
    seconds,
    spread,
    stamp,
    table,
    versions,
)


@dataclass(frozen=True)
class Engine:
    """How one engine is started: an interpreter and the arguments of its script."""

    name: str
    environment: str  # folder under --peers; "" is this interpreter
    arguments: Callable[[argparse.Namespace], list[str]]

    def python(self, given: argparse.Namespace) -> str:
        own = given.peers / self.environment / "bin" / "python" if self.environment else None
        return str(own.absolute()) if own is not None and own.exists() else sys.executable

    def command(self, given: argparse.Namespace) -> list[str]:
        script = str(HERE / "peers" / f"{self.name}_run.py")
        prompt = ["--prompt-ids", given.prompt_ids] if given.prompt_ids else []
        common = [str(given.checkpoint), "--new-tokens", str(given.new_tokens), *prompt]
        return [self.python(given), script, *common, *self.arguments(given)]


def airllm_split(given: argparse.Namespace) -> Path:
    return Path(given.airllm_split) if given.airllm_split else Path(f"{given.checkpoint}-airllm")


ENGINES = {
    "lamina": Engine("lamina", "", lambda given: ["--memory", str(given.memory or given.cap)]),
    "llama_cpp": Engine("llama_cpp", "llama_cpp", lambda given: []),
    "accelerate_disk": Engine(
        "accelerate_disk", "accelerate", lambda given: ["--cpu-memory", str(given.accelerate_memory or given.cap // 3)]
    ),
    "airllm": Engine("airllm", "airllm", lambda given: ["--split", str(airllm_split(given))]),
}


def measure(engine: Engine, given: argparse.Namespace) -> dict[str, object]:
    """One run of one engine: what it says of itself and what the cgroup says of it."""
    before = rate_now(given.checkpoint)
    run = run_capped(engine.command(given), given.cap, timeout=given.timeout)
    line: dict[str, object] = {"engine": engine.name, **cost(run), "disk_before_bytes_per_second": before}
    if run.failure is None:
        line |= run.last_json() | {"engine": engine.name}
    return line


def summarize(lines: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Per engine: medians and spread of s/token, and how many times Lamina's it is."""
    summary: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(str(line["engine"]) for line in lines):
        own = [line for line in lines if line["engine"] == name]
        good = [line for line in own if line["failure"] is None]
        summary[name] = {"runs": len(own), "failed": len(own) - len(good)}
        for key in (
            "seconds_per_token",
            "time_to_first_token_seconds",
            "load_seconds",
            "peak_rss_bytes",
            "read_bytes",
            "disk_before_bytes_per_second",
        ):
            values = [value for line in good if isinstance(value := line.get(key), int | float)]
            if values:
                summary[name][key] = spread(values)
        summary[name]["tokens"] = good[0].get("tokens") if good else None
    ours = summary.get("lamina", {}).get("seconds_per_token")
    for row in summary.values():
        theirs = row.get("seconds_per_token")
        if isinstance(ours, dict) and isinstance(theirs, dict):
            row["times_lamina"] = theirs["median"] / ours["median"]
        row["same_first_tokens"] = agreement(row["tokens"], summary.get("lamina", row)["tokens"])
    return summary


def agreement(tokens: object, reference: object) -> int | None:
    """How many leading tokens two engines share: all of them, but for ties in bfloat16."""
    if not (isinstance(tokens, list) and isinstance(reference, list)):
        return None
    pairs = zip(tokens, reference, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def show(summary: dict[str, dict[str, object]]) -> str:
    rows = []
    for name, row in summary.items():

        def figure(key: str, part: str = "median", row: dict[str, object] = row) -> object:
            value = row.get(key)
            return value[part] if isinstance(value, dict) else None

        rows.append(
            (
                name,
                seconds(figure("seconds_per_token")),
                f"{seconds(figure('seconds_per_token', 'min'))} - {seconds(figure('seconds_per_token', 'max'))}",
                seconds(row.get("times_lamina")),
                seconds(figure("time_to_first_token_seconds")),
                seconds(figure("load_seconds")),
                gigabytes(figure("peak_rss_bytes")),
                gigabytes(figure("read_bytes")),
                gigabytes(figure("disk_before_bytes_per_second")),
                row["same_first_tokens"],
                f"{row['failed']}/{row['runs']}",
            )
        )
    head = (
        "engine",
        "s/token",
        "spread",
        "x Lamina",
        "first token s",
        "load s",
        "peak RSS",
        "read",
        "disk/s",
        "same",
        "failed",
    )
    return table(rows, head)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=BENCH / "llama-3b", help="made (3B shape) if it is not there"
    )
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"), help="what peers.sh made")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated, in the order of their turns")
    parser.add_argument("--cap", type=parse_size, default=3 * 10**9, help="memory for each run, page cache included")
    parser.add_argument("--memory", type=parse_size, help="Lamina's budget; default: the cap")
    parser.add_argument(
        "--accelerate-memory", type=parse_size, help="accelerate's max_memory; default: a third of the cap"
    )
    parser.add_argument("--airllm-split", type=Path, help="AirLLM's copy; default: CHECKPOINT-airllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--prompt-ids", help="comma-separated; default: 16 fixed ids")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    given = parser.parse_args()
    given.engines = given.engines.split(",")
    if unknown := set(given.engines) - set(ENGINES):
        parser.error(f"no engine named {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    return given


def main() -> None:
    given = arguments()
    make_checkpoint(given.checkpoint, "3b", gguf="llama_cpp" in given.engines)
    if "airllm" in given.engines:  # AirLLM's own copying is not what is measured
        prepared = run_capped([*ENGINES["airllm"].command(given), "--prepare"], drop=False)
        if prepared.failure:
            raise MeasuringError(f"AirLLM could not split the checkpoint: {prepared.failure}")
    said, packages = stamp(), {name: versions(ENGINES[name].python(given)) for name in given.engines}
    lines = []
    for turn, name in itertools.product(range(given.rounds), given.engines):
        line = measure(ENGINES[name], given)
        lines.append(line)
        record("first_reading", said | {"round": turn, "packages": packages[name]} | line)
        print(
            f"round {turn} {name}: {line['failure'] or seconds(line['seconds_per_token']) + ' s/token'}",
            file=sys.stderr,
        )
    summary = summarize(lines)
    print(show(summary))
    print(json.dumps(said | {"cap_bytes": given.cap, "packages": packages, "engines": summary}))


if __name__ == "__main__":
    run_main(main)
