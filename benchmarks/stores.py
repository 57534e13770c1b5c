"""What each compression of a store gives: size, s/token at one budget in turns with the plain checkpoint, peak memory.

    python benchmarks/stores.py
    python benchmarks/stores.py --checkpoint MODEL --memory 2GB --rounds 5 --compressions 8bit,4bit

The stores are made beside the checkpoint by `lamina split` if they are not there. In every round each of them runs
once, with page cache dropped before, in an order that turns round by round; a ratio is the plain checkpoint's s/token
over the store's within one round. With `--cap` each run is in a memory cgroup of the budget's size, page cache counted.

One JSON line goes to benchmarks/results/stores.jsonl; a table comes last but one, one JSON line last.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import lamina_cli
from lamina_cli import number
from report import (
    BENCH,
    MeasuringError,
    gigabytes,
    make_checkpoint,
    parse_size,
    record,
    run_main,
    spread,
    stamp,
    table,
    versions,
)
from turns import in_turns, ranged, ratios

COMPRESSIONS = ("8bit", "4bit", "lossless")


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def store(checkpoint: Path, compression: str) -> Path:
    """The store of a checkpoint, made where it is not there; a finished one is left as it is."""
    folder = checkpoint.with_name(f"{checkpoint.name}-{compression}")
    asked = lamina_cli.command("split", checkpoint, "--to", folder, "--compression", compression, "--quiet")
    run = subprocess.run(asked, capture_output=True, text=True)
    if run.returncode:
        raise MeasuringError(f"lamina split {checkpoint} --compression {compression}: {run.stderr.strip()[-200:]}")
    return folder


def rounds(folders: dict[str, Path], given: argparse.Namespace) -> list[dict[str, dict[str, object]]]:
    """The figures of each folder in each round."""
    found: list[dict[str, dict[str, object]]] = [{} for _ in range(given.rounds)]
    cap = given.memory if given.cap else None
    for turn, name in in_turns(list(folders), given.rounds):
        found[turn][name] = lamina_cli.bench(folders[name], given.memory, given.steps + 1, cap=cap)
        said = f"{name} {number(found[turn][name], 'seconds_per_token'):.3f}"
        print(f"stores.py: round {turn + 1}: {said} s/token", file=sys.stderr)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=BENCH / "llama-3b", help="made (3B shape) if it is not there"
    )
    parser.add_argument("--memory", type=parse_size, default=2 * 10**9)
    parser.add_argument("--cap", action="store_true", help="run each in a memory cgroup as large as the budget")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compressions", default=",".join(COMPRESSIONS), help="comma-separated")
    given = parser.parse_args()
    given.compressions = given.compressions.split(",")
    if unknown := set(given.compressions) - set(COMPRESSIONS):
        parser.error(f"no compression named {', '.join(sorted(unknown))}; there are {', '.join(COMPRESSIONS)}")
    return given


def main() -> None:
    given = arguments()
    checkpoint = make_checkpoint(given.checkpoint, "3b")
    folders = {"plain": checkpoint} | {name: store(checkpoint, name) for name in given.compressions}
    found = rounds(folders, given)
    plain_bytes = weight_bytes(checkpoint)
    rows, result = [], {}
    times = {name: [number(each[name], "seconds_per_token") for each in found] for name in folders}
    for name, folder in folders.items():
        times_plain = ratios(times, "plain", name)
        peak = max(number(each[name], "peak_rss_bytes") for each in found)
        read = number(found[-1][name], "bytes_read_per_pass")
        share = weight_bytes(folder) / plain_bytes
        result[name] = {
            "size": share,
            "seconds_per_token": spread(times[name]),
            "times_plain": spread(times_plain),
            "peak_rss_bytes": peak,
            "bytes_read_per_pass": read,
        }
        rows.append((name, f"{share:.3f}", ranged(times[name]), ranged(times_plain), gigabytes(read), gigabytes(peak)))
    said = stamp() | {"packages": versions(), "memory_bytes": given.memory, "capped": given.cap, "result": result}
    record("stores", said | {"rounds": found})
    print(table(rows, ("", "of bf16", "s/token", "times as fast", "read a pass", "peak")))
    print(json.dumps(said))


if __name__ == "__main__":
    run_main(main)
