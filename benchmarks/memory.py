"""Whether Lamina keeps its memory promise, with the kernel as the witness.

    python benchmarks/memory.py                                        # needs root for the caps
    python benchmarks/memory.py --parts ladder --small .cache/bench/llama-3b

70b      a 70B shape (138 GB, sparse) with --memory 2GB, in a cgroup of 2 GiB that counts page cache
405b     a 405B shape (812 GB, sparse) with --memory 4GB, in a cgroup of 4 GiB
235b     a mixture of experts of Qwen3-235B's shape (470 GB, sparse) with --memory 4GB, in a cgroup of 4 GB
moe      a mixture of experts (11.5 GB, 128 experts) with --memory 1.2GB, 1,500 tokens of prompt, its own cgroup
prompt   a 3B shape in each compression, and each --gguf file, with --memory 1GB, a prompt of 1,000 tokens, in a cgroup
         of 1 GB
minima   each --models folder or file, and sparse ones of ten shapes, at the very minimum that `lamina plan` states
         for a context of 256 and of 2,048 tokens, the prompt filling it; the share says how much of it was used
images   a picture of 896 pixels a side for each family of `vision_checkpoints.py`, at the minimum that is stated
         for it, in a cgroup of just that size
ladder   a small model at budgets from `lamina plan`'s minimum to all of it, each in a cgroup of that size and the same
         share more: every budget has to be kept, and every budget has to give the same tokens

A sparse checkpoint reads as zeros, but every byte passes through the engine. A run passes if it ends well, nothing was
killed, and the peak resident memory of the process is at most the budget. The cgroup's own peak is shown too: it counts
page cache and the kernel's own pages, of which the kernel takes back what it can before it kills anything.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lamina_cli
from family_checkpoints import FAMILIES, write_family
from report import BENCH, gigabytes, make_checkpoint, parse_size, record, run_main, stamp, table, versions
from stores import COMPRESSIONS, store
from vision_checkpoints import TOKENS, write_seeing

SAYING = "w100 w101"  # beside a picture
SLACK = 2**30 / 10**9  # what a container of N GiB has over a budget of N GB


def proof(
    name: str,
    checkpoint: Path,
    budget: int,
    new_tokens: int,
    given: argparse.Namespace,
    prompt: str = lamina_cli.PROMPT_IDS,
    slack: float = SLACK,
    more: Sequence[object] = (),
) -> dict[str, object]:
    """One generation under one budget, in a cgroup of `slack` times as much."""
    print(f"memory.py: {name} at {gigabytes(budget)}", file=sys.stderr)
    context = ["--context", given.context] if given.context else []
    cap = int(budget * slack)
    context += more
    asked = {"cap": cap, "timeout": given.timeout, "prompt": prompt}
    line = lamina_cli.generate(checkpoint, budget, new_tokens, context, **asked)
    peaks = [line["process_peak_bytes"], line["cgroup_anonymous_bytes"]]
    peak = max(peak for peak in peaks if isinstance(peak, int))
    kept = line["failure"] is None and peak <= budget
    return {"proof": name, "budget_bytes": budget, "peak_bytes": peak, "kept": kept} | line


def giant(shape: str, folder: Path, budget: int, given: argparse.Namespace) -> Iterator[dict[str, object]]:
    checkpoint = make_checkpoint(folder, shape, sparse=True)
    yield proof(shape, checkpoint, budget, given.new_tokens, given)


def prompts(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    checkpoint = make_checkpoint(given.small, "3b")
    folders = {compression: store(checkpoint, compression) for compression in COMPRESSIONS}
    for name, folder in (folders | {file.name: file for file in given.gguf}).items():
        yield proof(f"1,000 tokens, {name}", folder, 10**9, 3, given, lamina_cli.prompt_of(1000), 1)


def experts(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    checkpoint = make_checkpoint(given.folder / "qwen3moe-11gb", "qwen3moe-11gb", script="moe_checkpoints.py")
    yield proof("1,500 tokens, qwen3moe-11gb", checkpoint, 1_200_000_000, 4, given, lamina_cli.prompt_of(1500), 1)


def giant_of_experts(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    checkpoint = make_checkpoint(given.folder / "qwen3-235b", "qwen3-235b", sparse=True, script="moe_checkpoints.py")
    yield proof("qwen3-235b", checkpoint, 4 * 10**9, given.new_tokens, given, slack=1)


def minima(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    families = [given.folder / "families" / family for family in FAMILIES]
    for folder in families:
        if not (folder / "config.json").exists():
            write_family(folder, folder.name)
    for model in [*given.models, *families]:
        for context in (256, 2048):
            asked = ["--context", context, "--draft", "none"]
            least = int(lamina_cli.number(lamina_cli.plan(model, asked), "minimum_memory_bytes"))
            prompt = lamina_cli.prompt_of(context - 8)
            line = proof(f"{model.name}, {context} tokens", model, least, 6, given, prompt, more=asked)
            yield line | {"minimum_over_peak": round(least / int(lamina_cli.number(line, "peak_bytes")), 3)}


def images(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    from PIL import Image

    picture = given.folder / "vision" / "noise.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((896, 896), 90).convert("RGB").save(picture)
    for name in given.seeing or TOKENS:
        folder = picture.parent / name
        if not (folder / "config.json").exists():
            write_seeing(folder, name)
        asked: list[object] = ["--context", TOKENS[name] + 64, "--draft", "none"]
        least = int(lamina_cli.number(lamina_cli.plan(folder, asked), "minimum_memory_bytes"))
        more = [*asked, "--image", picture]
        line = proof(f"896 px, {name}", folder, least, 4, given, SAYING, 1, more)
        if stated := re.search(r"at least (\d+) bytes", str(line["failure"])):
            line = proof(f"896 px, {name}", folder, int(stated[1]), 4, given, SAYING, 1, more)
        yield line | {"planned_minimum_bytes": least}


def ladder(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    checkpoint = make_checkpoint(given.small, "3b")
    plan = lamina_cli.plan(checkpoint, ["--context", given.context] if given.context else [])
    least = int(lamina_cli.number(plan, "minimum_memory_bytes"))
    whole = least + int(lamina_cli.number(plan, "model_bytes"))
    first: object = None
    for rung in range(given.rungs):
        budget = least + (whole - least) * rung // max(1, given.rungs - 1)
        line = proof(f"rung {rung}", checkpoint, budget, given.ladder_tokens, given)
        first = first or line["tokens"]
        yield line | {"same_tokens": line["tokens"] == first}


def proofs(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    for part in given.parts:
        if part == "ladder":
            yield from ladder(given)
        elif part == "70b":
            yield from giant("70b", given.folder / "llama-70b", given.memory_70b, given)
        elif part == "235b":
            yield from giant_of_experts(given)
        elif part == "moe":
            yield from experts(given)
        elif part == "minima":
            yield from minima(given)
        elif part == "prompt":
            yield from prompts(given)
        elif part == "images":
            yield from images(given)
        else:
            yield from giant("405b", given.folder / "llama-405b", given.memory_405b, given)


def holds(line: dict[str, object]) -> bool:
    """The memory was kept, and the budget changed nothing in the result."""
    return bool(line["kept"]) and bool(line.get("same_tokens", True))


def arguments() -> argparse.Namespace:
    parts = ("ladder", "minima", "images", "prompt", "moe", "70b", "235b", "405b")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BENCH, help="where the sparse checkpoints are or are made")
    parser.add_argument("--small", type=Path, default=BENCH / "llama-3b", help="made (3B shape) if it is not there")
    parser.add_argument("--memory-70b", type=parse_size, default=2 * 10**9)
    parser.add_argument("--memory-405b", type=parse_size, default=4 * 10**9)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="GGUF files of the part `prompt`")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="of the part `minima`")
    parser.add_argument("--seeing", nargs="*", choices=TOKENS, default=[], help="families of the part `images`")
    parser.add_argument("--rungs", type=int, default=5, help="budgets from the minimum to all of the model")
    parser.add_argument("--ladder-tokens", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=2, help="of the giants")
    parser.add_argument("--context", type=int, help="Lamina's --context; default: its own")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--parts", default=",".join(parts), help="comma-separated")
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if unknown := set(given.parts) - set(parts):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    return given


def main() -> None:
    given = arguments()
    said = stamp() | {"packages": versions()}
    lines = []
    for line in proofs(given):
        lines.append(line)
        record("memory", said | line)
    rows = [
        (
            line["proof"],
            gigabytes(line["budget_bytes"]),
            gigabytes(line["peak_bytes"]),
            gigabytes(line["cap_bytes"]),
            gigabytes(line["cgroup_peak_bytes"]),
            f"{line['wall_seconds']} s",
            line.get("minimum_over_peak", ""),
            "kept"
            if line["kept"] and line.get("same_tokens", True)
            else f"BROKEN: {line['failure'] or 'see the peak'}",
        )
        for line in lines
    ]
    print(table(rows, ("proof", "budget", "peak RSS", "cgroup cap", "cgroup peak", "wall", "minimum/peak", "promise")))
    for line in lines:
        if not holds(line):
            print(f"{line['proof']}: {line['failure'] or ('other tokens' if line['kept'] else 'peak above budget')}")
    passed = all(map(holds, lines))
    print(json.dumps(said | {"passed": passed, "proofs": lines}))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    run_main(main)
