"""How well Lamina streams, alone on the machine: the disk's share, what memory buys, and what it costs when all fits.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --parts decode,residency --rounds 5
    python benchmarks/streaming.py --parts tiny --tiny .cache/bench/smollm2-135m

decode      disk_fraction and s/token of 8 decode steps with --memory 2GB
residency   s/token with 2GB and with 5GB, in turns: what the resident layers save
resident    all weights in memory: s/token over plain transformers', in turns, a process each (1 is as fast)
tiny        the same for a small model, where the overhead per module would show
startup     wall time of `lamina --help` and of `import lamina`; seconds until a 70B shape (sparse) is ready

Page cache is dropped before each run. One JSON line per part goes to benchmarks/results/streaming.jsonl; a table comes
last but one, one JSON line last.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lamina_cli
from capped import drop_caches, run_capped
from lamina_cli import number
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
from turns import in_turns, ranged

Part = dict[str, object]
Rows = list[tuple[object, ...]]


def decode(given: argparse.Namespace) -> tuple[Part, Rows]:
    checkpoint = make_checkpoint(given.checkpoint, "3b")
    runs = [lamina_cli.bench(checkpoint, given.memory, given.steps + 1) for _ in range(given.rounds)]
    fractions = [number(run, "disk_fraction") for run in runs]
    times = [number(run, "seconds_per_token") for run in runs]
    keys = ("read_bytes_per_second", "disk_bytes_per_second", "bytes_read_per_pass", "peak_rss_bytes")
    last = {key: number(runs[-1], key) for key in keys}
    part = {"memory_bytes": given.memory, "disk_fraction": spread(fractions), "seconds_per_token": spread(times)}
    return part | {"last": last, "runs": runs}, [
        (f"decode at {gigabytes(given.memory)}: disk_fraction", ranged(fractions)),
        (f"decode at {gigabytes(given.memory)}: s/token", ranged(times)),
        ("  read, of the ceiling, GB/s", f"{last[keys[0]] / 1e9:.2f} of {last[keys[1]] / 1e9:.2f}"),
        ("  peak RSS", gigabytes(last["peak_rss_bytes"])),
    ]


def residency(given: argparse.Namespace) -> tuple[Part, Rows]:
    checkpoint = make_checkpoint(given.checkpoint, "3b")
    times: dict[int, list[float]] = {given.memory: [], given.more_memory: []}
    for _, memory in in_turns(list(times), given.rounds):
        times[memory].append(number(lamina_cli.bench(checkpoint, memory, given.steps + 1), "seconds_per_token"))
    little, much = (spread(times[memory])["median"] for memory in (given.memory, given.more_memory))
    part = {
        "seconds_per_token": {str(memory): spread(found) for memory, found in times.items()},
        "ratio": much / little,
    }
    return part, [
        *((f"s/token at {gigabytes(memory)}", ranged(found)) for memory, found in times.items()),
        ("  time that the memory leaves", f"{much / little:.2f}"),
    ]


def against_plain(checkpoint: Path, given: argparse.Namespace) -> tuple[Part, Rows]:
    """Everything resident beside plain transformers: s/token, in turns, a fresh process each."""
    plain = [sys.executable, HERE / "peers" / "accelerate_disk_run.py", checkpoint, "--plain"]
    plain += ["--prompt-ids", lamina_cli.PROMPT_IDS, "--new-tokens", given.resident_steps + 1]

    def theirs_now() -> dict[str, object]:
        run = run_capped([str(word) for word in plain])
        if run.failure:
            raise MeasuringError(f"plain transformers on {checkpoint}: {run.failure}")
        return run.last_json()

    measures = {
        "lamina": lambda: lamina_cli.bench(checkpoint, None, given.resident_steps + 1),
        "plain": theirs_now,
    }
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _, name in in_turns(list(measures), given.rounds):
        times[name].append(number(measures[name](), "seconds_per_token"))
    ours, theirs = times.values()
    ratio = spread(ours)["median"] / spread(theirs)["median"]
    part = {"lamina_seconds_per_token": spread(ours), "plain_seconds_per_token": spread(theirs), "ratio": ratio}
    return part, [
        (f"all in memory, {checkpoint.name}: s/token", ranged(ours)),
        ("  plain transformers", ranged(theirs)),
        ("  times plain", f"{ratio:.2f}"),
    ]


def resident(given: argparse.Namespace) -> tuple[Part, Rows]:
    return against_plain(make_checkpoint(given.checkpoint, "3b"), given)


def tiny(given: argparse.Namespace) -> tuple[Part, Rows]:
    return against_plain(given.tiny or make_checkpoint(BENCH / "llama-tiny", "tiny"), given)


def wall(command: list[str]) -> float:
    began = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise MeasuringError(f"{command[-1]}: {run.stderr.strip()[-200:]}")
    return time.perf_counter() - began


def startup(given: argparse.Namespace) -> tuple[Part, Rows]:
    drop_caches()
    cold = wall(lamina_cli.command("--help"))
    warm = [wall(lamina_cli.command("--help")) for _ in range(max(5, given.rounds))]
    bare = [wall([sys.executable, "-c", "import lamina"]) for _ in range(max(5, given.rounds))]
    big = make_checkpoint(given.big, "70b", sparse=True)
    planned = wall(lamina_cli.command("plan", big, "--memory", given.memory, "--json"))
    ready = number(lamina_cli.bench(big, given.memory, 1), "load_seconds")
    part = {"help_cold": cold, "help": spread(warm), "import": spread(bare), "plan_70b": planned, "ready_70b": ready}
    return part, [
        ("lamina --help, s", ranged(warm)),
        ("  with nothing in the page cache", seconds(cold)),
        ("python -c 'import lamina', s", ranged(bare)),
        ("lamina plan, 70B shape, s", seconds(planned)),
        ("70B shape ready, s", seconds(ready)),
    ]


PARTS: dict[str, Callable[[argparse.Namespace], tuple[Part, Rows]]] = {
    part.__name__: part for part in (decode, residency, resident, tiny, startup)
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=BENCH / "llama-3b", help="made (3B shape) if it is not there"
    )
    parser.add_argument("--tiny", type=Path, help="folder of a small model; default: a made one of 10 MB")
    parser.add_argument("--big", type=Path, default=BENCH / "llama-70b", help="made (70B shape, sparse) if not there")
    parser.add_argument("--memory", type=parse_size, default=2 * 10**9)
    parser.add_argument("--more-memory", type=parse_size, default=5 * 10**9)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a streamed run")
    parser.add_argument("--resident-steps", type=int, default=24, help="decode steps of a run that is all in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return given


def main() -> None:
    given = arguments()
    said = stamp() | {"packages": versions()}
    parts: Part = {}
    rows: Rows = []
    for name in given.parts:
        print(f"streaming.py: {name}", file=sys.stderr)
        try:
            parts[name], more = PARTS[name](given)
        except MeasuringError as error:
            parts[name], more = {"failure": str(error)}, [(name, "failed")]
            print(f"streaming.py: {error}", file=sys.stderr)
        rows += more
        record("streaming", said | {"part": name, "result": parts[name]})
    print(table(rows, ("Lamina", "median (least - greatest)")))
    print(json.dumps(said | {"parts": parts}))
    if any(isinstance(part, dict) and "failure" in part for part in parts.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
