"""What reading experts on demand saves: Lamina by default beside Lamina streaming whole layers of experts, in turns.

    python benchmarks/moe_checkpoints.py .cache/bench/mixtral-12gb
    python benchmarks/experts.py .cache/bench/mixtral-12gb                               # budget: 0.3 of the model
    python benchmarks/experts.py .cache/bench/qwen3moe-11gb --share 0.4 --rounds 5 --cap 6GB
    python benchmarks/experts.py FOLDER --text novel.txt --expert-share 0.4 --prompt-tokens 128 --new-tokens 128

on_demand     as it is by default: the experts that a token is sent to are read, the memory left over keeps experts
whole_layers  Lamina as it was before (commit BEFORE, unpacked into .cache/): every expert of a layer, one after the
              other, streams through the ring in every pass

Both have the same budget, and each run is a process of its own with nothing in the page cache; who goes first changes
from round to round. The uncached bound is the time in which the bare drive, measured within the same run, gives the
bytes that one token takes: all that is not an expert, and the experts of one token. A cache can do better than it.

Random weights send every token anywhere, so a cache finds little. --text reads a real text along with a real model
(experts_run.py): a prefill of --prompt-tokens, then --new-tokens steps, each with the text's own next token.
One JSON line per run goes to benchmarks/results/experts.jsonl; a table comes last but one, one JSON line last.
"""

import argparse
import json
import math
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import lamina_cli
from capped import run_capped
from lamina_cli import number
from report import (
    HERE,
    MeasuringError,
    gigabytes,
    parse_size,
    record,
    run_main,
    seconds,
    spread,
    stamp,
    table,
    versions,
)
from turns import in_turns

Line = dict[str, object]
MODES = ("on_demand", "whole_layers")
BEFORE = "0ecc16c"  # the last commit that streams whole layers of experts
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what the families call the experts of a layer
SETTLING = 4  # plans asked for, to find the budget of a cache


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights, from the headers: all, those in routed experts, those that one token takes."""

    model: int
    experts: int
    active: int


def tensor_bytes(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as source:
            (size,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = end - begin
    return found


def sizes_of(folder: Path) -> Sizes:
    """What the folder's headers and config say.

    Raises:
        MeasuringError: no mixture of experts is there.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise MeasuringError(
            f"{folder} is no checkpoint ({error.strerror}): write one with moe_checkpoints.py"
        ) from None
    config = config.get("text_config", config)
    tensors = tensor_bytes(folder)
    experts = sum(nbytes for name, nbytes in tensors.items() if ".experts." in name)
    count = next((config[key] for key in COUNTS if key in config), 0)
    if not experts or not count:
        raise MeasuringError(f"{folder} has no experts: write a mixture with moe_checkpoints.py")
    model = sum(tensors.values())
    # Of a table that is only looked up a token takes one row; of a tied one the output takes all.
    looked_up = 0
    if any("lm_head" in name for name in tensors):
        looked_up = sum(nbytes for name, nbytes in tensors.items() if "embed_tokens" in name)
    active = model - experts - looked_up + experts * config["num_experts_per_tok"] // count
    return Sizes(model, experts, active)


def plan_at(budget: int | None, given: argparse.Namespace) -> Line:
    """`lamina plan` for the runs' context; without a budget only its minimum means something."""
    memory = ["--memory", budget] if budget else []
    return lamina_cli.plan(given.checkpoint, [*memory, "--context", given.prompt_tokens + given.new_tokens])


def budget_of(given: argparse.Namespace, sizes: Sizes) -> int:
    """Bytes of memory: as given, a share of the model, or what keeps a share of the experts beside all the rest."""
    if given.memory:
        return int(given.memory)
    if given.expert_share is None:
        return int(given.share * sizes.model)
    least = number(plan_at(None, given), "minimum_memory_bytes")
    budget = int(least + sizes.model - sizes.experts + given.expert_share * sizes.experts)
    for _ in range(SETTLING):
        plan = plan_at(budget, given)
        if not plan.get("expert_slots"):
            break
        slots = number(plan, "expert_slots")
        missing = math.ceil(given.expert_share * number(plan, "experts")) - slots
        if not missing:
            break
        budget += int(missing * number(plan, "expert_cache_bytes") / slots)
    return budget


def measure(mode: str, budget: int, sizes: Sizes, given: argparse.Namespace) -> Line:
    """One run in a process of its own: its figures, what it cost, and the uncached bound; a failure is in the line."""
    asked = [sys.executable, HERE / "experts_run.py", given.checkpoint, "--memory", budget]
    asked += ["--prompt-tokens", given.prompt_tokens, "--new-tokens", given.new_tokens]
    asked += ["--text", given.text] if given.text else []
    run = run_capped([str(word) for word in asked], given.cap, timeout=given.timeout, environment=environment(mode))
    line = lamina_cli.cost(run) | {"mode": mode}
    if run.failure:
        return line
    line |= run.last_json()
    line.setdefault("active_bytes_per_token", sizes.active)
    disk = number(line, "disk_bytes_per_second")
    if not disk:  # nothing streamed
        return line
    bound = number(line, "active_bytes_per_token") / disk
    return line | {"uncached_bound_seconds": bound, "times_bound": bound / number(line, "seconds_per_token")}


def environment(mode: str) -> dict[str, str]:
    """What the process runs with: the command line's own setting of OpenMP, and the source that the mode stands for."""
    variables = {"GOMP_SPINCOUNT": "10000"}
    if mode == "whole_layers":
        folder = HERE.parent / ".cache" / f"lamina-{BEFORE}"
        if not folder.exists():
            folder.mkdir(parents=True)
            packed = subprocess.run(["git", "archive", BEFORE, "src"], cwd=HERE.parent, check=True, capture_output=True)
            subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        variables["PYTHONPATH"] = str(folder / "src")
    return variables


def rounds(budget: int, sizes: Sizes, given: argparse.Namespace) -> list[Line]:
    lines = []
    for turn, mode in in_turns(given.modes, given.rounds):
        line = measure(mode, budget, sizes, given) | {"round": turn}
        took = line["failure"] or f"{seconds(line['seconds_per_token'])} s/token"
        print(f"experts.py: round {turn + 1}, {mode}: {took}", file=sys.stderr)
        record("experts", stamp() | {"checkpoint": given.checkpoint.name, "sizes": asdict(sizes)} | line)
        lines.append(line)
    return lines


# What the table shows: words, key of a run's line, divisor, digits after the point.
FIGURES = (
    ("s/token", "seconds_per_token", 1, 3),
    ("expert hits, share", "expert_hit_rate", 1, 3),
    ("experts read a token, GB", "expert_bytes_per_token", 1e9, 3),
    ("streamed a pass, GB", "bytes_read_per_pass", 1e9, 3),
    ("read a token, GB", "read_bytes_per_token", 1e9, 3),
    ("read, GB/s", "read_bytes_per_second", 1e9, 2),
    ("bare disk, GB/s", "disk_bytes_per_second", 1e9, 2),
    ("share of the disk", "disk_fraction", 1, 2),
    ("active bytes of a token, GB", "active_bytes_per_token", 1e9, 3),
    ("uncached bound, s/token", "uncached_bound_seconds", 1, 3),
    ("speed, times the bound", "times_bound", 1, 2),
    ("perplexity", "perplexity", 1, 3),
    ("peak RSS, GB", "peak_rss_bytes", 1e9, 2),
)


def figures(lines: list[Line]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each figure that the runs have."""
    found = {}
    for _, key, _, _ in FIGURES:
        values = [value for line in lines if isinstance(value := line.get(key), int | float) and math.isfinite(value)]
        if values:
            found[key] = spread(values)
    return found


def ratios(lines: list[Line]) -> dict[str, float] | None:
    """Seconds of whole layers over seconds on demand, round by round; None where no round has both."""
    taken: dict[object, dict[object, float]] = {}
    for line in lines:
        if not line["failure"]:
            taken.setdefault(line["round"], {})[line["mode"]] = number(line, "seconds_per_token")
    pairs = [both["whole_layers"] / both["on_demand"] for both in taken.values() if len(both) == len(MODES)]
    return spread(pairs) if pairs else None


def same_tokens(lines: list[Line]) -> int | None:
    """Leading tokens that all greedy runs have in common."""
    found = [tokens for line in lines if isinstance(tokens := line.get("tokens"), list)]
    if not found:
        return None
    return next((i for i, tokens in enumerate(zip(*found, strict=False)) if len(set(tokens)) > 1), len(found[0]))


def ranged(found: dict[str, float] | None, unit: float = 1, digits: int = 2) -> str:
    if found is None:
        return "-"
    median, least, greatest = (f"{found[key] / unit:.{digits}f}" for key in ("median", "min", "max"))
    return median if least == greatest else f"{median} ({least} - {greatest})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a mixture of experts, as moe_checkpoints.py writes it")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--share", type=float, default=0.3, help="budget as a share of the model's bytes")
    budget.add_argument("--memory", type=parse_size, help="budget in bytes, e.g. 4GB")
    budget.add_argument("--expert-share", type=float, help="budget for all but the experts, and this share of them")
    parser.add_argument("--text", type=Path, help="read this text along in place of greedy tokens")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of the prefill")
    parser.add_argument("--new-tokens", type=int, default=16, help="greedy: the first comes from the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    parser.add_argument("--cap", type=parse_size, help="memory cgroup of a run, page cache counted; needs root")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    given = parser.parse_args()
    given.modes = given.modes.split(",")
    if unknown := set(given.modes) - set(MODES):
        parser.error(f"no mode named {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    return given


def main() -> None:
    given = arguments()
    sizes = sizes_of(given.checkpoint)
    budget = budget_of(given, sizes)
    plan = plan_at(budget, given)
    lines = rounds(budget, sizes, given)
    summary = {mode: figures([line for line in lines if line["mode"] == mode]) for mode in given.modes}
    ratio, same = ratios(lines), same_tokens(lines)
    print(
        f"{given.checkpoint.name}: {gigabytes(sizes.model)}, {gigabytes(sizes.experts)} of it experts, "
        f"{gigabytes(sizes.active)} active; budget {gigabytes(budget)}, {budget / sizes.model:.2f} of the model, "
        f"with {plan.get('expert_slots', '?')} of {plan.get('experts', '?')} experts cached"
    )
    rows = [
        (words, *(ranged(summary[mode].get(key), unit, digits) for mode in given.modes))
        for words, key, unit, digits in FIGURES
        if any(key in found for found in summary.values())
    ]
    print(table(rows, ("median (least - greatest)", *given.modes)))
    print(f"whole_layers takes {ranged(ratio)} times as long as on_demand; same leading tokens: {same}")
    said = stamp() | {"packages": versions(), "checkpoint": given.checkpoint.name, "sizes": asdict(sizes)}
    print(
        json.dumps(said | {"memory_bytes": budget, "plan": plan, "modes": summary, "ratio": ratio, "same_tokens": same})
    )
    failed = [line for line in lines if line["failure"]]
    peaks = [number(line, "peak_rss_bytes") for line in lines if not line["failure"]]
    if failed or max(peaks) > budget:
        sys.exit(f"experts.py: {failed[0]['failure'] if failed else 'a peak is above the budget'}")


if __name__ == "__main__":
    run_main(main)
