"""Lamina beside its peers: same weights, same prompts, same memory. The figures of the README come from here.

    benchmarks/peers.sh .cache/peers                                  # once: an environment for each peer
    python benchmarks/compare.py dense                                # as root, for the cap is a memory cgroup
    python benchmarks/compare.py dense --models 7b --caps 1/3,3GB,none --rounds 5 --engines lamina,llama_cpp
    python benchmarks/compare.py --show                               # the tables of what is recorded, no measuring
    python benchmarks/compare.py --write-docs                         # and into docs/benchmarks.md

Engines take turns in an order that is turned and reversed round by round, each run in a process and a cgroup of its
own, page cache dropped before and counted. Greedy, no early end; s/token is the median over decode steps, which leaves
the prompt's pass out. Every run, failed ones too, is one JSON line in results/compare.jsonl; --show uses the newest
series for each workload, model and cap. "the disk itself" is what the bytes of one pass of Lamina take at the rate that
the bare drive gave in turns with its steps. "same" counts the leading tokens that are Lamina's.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
from capped import run_capped
from disk import rate_now
from lamina_cli import cost
from report import BENCH, HERE, RESULTS, MeasuringError, record, run_main, seconds, stamp, versions
from turns import in_turns
from workloads import ENGINES, WORKLOADS, Case, Model, cap_of, has_gpu, make_base, model_named, prepare

PAGE = HERE.parent / "docs" / "benchmarks.md"
SHAPE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts", "num_experts_per_tok",
)  # fmt: skip


def without_paths(text: str) -> str:
    """Only the last name of each path: a recorded line says nothing of where this machine keeps things."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+([^\s/'\":]+)", r"\1", text)


def measure(name: str, python: str, case: Case, timeout: float) -> dict[str, Any]:
    """One run of one engine: what it says of itself and what the cgroup says of it."""
    before = rate_now(case.model.for_lamina)
    failures: list[str] = []
    commands = ENGINES[name].commands(python, case)
    for left, command in zip(reversed(range(len(commands))), commands, strict=True):
        run = run_capped(command, case.host_cap, drop=not case.workload.warm, timeout=timeout)
        line: dict[str, Any] = cost(run)
        if not run.oom_kills or not left:  # with less for its weights it may live
            break
        failures.append(f"{run.failure}: {' '.join(command[3:])}")
    line |= {"bare_before_bytes_per_second": before, "earlier_failures": list(map(without_paths, failures))}
    if name == "lamina":
        line["bare_after_bytes_per_second"] = rate_now(case.model.for_lamina)
    if run.failure is None:
        line |= flat(run.last_json())
    else:
        line["failure"] = without_paths(run.failure)
        line["peak_rss_bytes"] = line["process_peak_bytes"]
    line["arguments"] = [without_paths(word) for word in command[2:]]
    return line | {"engine": name}


def flat(said: dict[str, Any]) -> dict[str, Any]:
    """`lamina run` keeps its figures under `stats`; every other result has them on top."""
    stats = said.pop("stats", {})
    stats.pop("expert_tokens", None)
    return stats | said


def cases(given: argparse.Namespace) -> Iterator[tuple[str, Case, dict[str, str]]]:
    """Each workload, model and cap that was asked for, with the engines that can run it and their interpreters."""
    for name in given.workloads:
        workload = WORKLOADS[name]
        if workload.on_device and not has_gpu():
            say(f"{name}: no GPU here: not measured")
            continue
        engines = [each for each in given.engines or workload.engines if each in ENGINES]
        for model_name in given.models or workload.models:
            model = model_named(model_name, given.bench)
            make_base(model)
            ready = {each: python for each in engines if (python := made_ready(each, model, given)) is not None}
            for cap_text in given.caps or workload.caps:
                cap = cap_of(cap_text, model.nbytes)
                case = Case(workload, model, cap, given.new_tokens or workload.new_tokens)
                able = {each: python for each, python in ready.items() if ENGINES[each].runs_in(case)}
                if able:
                    yield name, case, able


def made_ready(name: str, model: Model, given: argparse.Namespace) -> str | None:
    """The interpreter of an engine whose copy of the weights is there now; None, and a line that says why, if not."""
    engine = ENGINES[name]
    python = engine.python(given.peers)
    if python is None:
        say(f"{name}: left out, {given.peers / engine.environment} is not there (benchmarks/peers.sh makes it)")
        return None
    try:
        prepare(engine, python, model)
    except MeasuringError as error:
        if name == "lamina":
            raise
        say(f"{name}: left out, {error}")
        return None
    return python


def measured(name: str, case: Case, pythons: dict[str, str], given: argparse.Namespace) -> None:
    """All rounds of a case, each run recorded when it ends."""
    config = json.loads((case.model.checkpoint / "config.json").read_text())
    said = stamp() | {
        "series": given.series,
        "workload": name,
        "figure": case.workload.figure,
        "model": case.model.name,
        "model_bytes": case.model.nbytes,
        "shape": {key: config[key] for key in SHAPE_KEYS if key in config},
        "on_device": case.workload.on_device,
        "prompt_tokens": case.workload.prompt_tokens,
        "sequences": case.workload.sequences,
        "asked_cap_bytes": case.cap,
    }
    packages = {python: versions(python) for python in set(pythons.values())}
    for turn, engine in in_turns(list(pythons), given.rounds):
        slow = ENGINES[engine].slow
        if slow and turn >= given.slow_rounds:
            continue
        own = replace(case, new_tokens=min(case.new_tokens, given.slow_tokens)) if slow else case
        line = measure(engine, pythons[engine], own, given.timeout)
        asked = {"round": turn, "new_tokens": own.new_tokens, "packages": packages[pythons[engine]]}
        record("compare", line | said | asked | {"date": stamp()["date"]}, given.results)  # what was asked counts
        figure = line.get(case.workload.figure)
        cap = "no cap" if case.cap is None else f"{case.cap / 1e9:.2f} GB"
        result = line["failure"] or f"{seconds(figure)} {tables.HEADS[case.workload.figure]}"
        say(f"{name} {case.model.name} {cap}, round {turn + 1} of {given.rounds}: {engine} {result}")


def say(text: str) -> None:
    print(f"compare.py: {text}", file=sys.stderr, flush=True)


def words(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    about = "\n".join(f"  {name:10}{each.about}" for name, each in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"workloads:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="see below; with --show: which tables")
    parser.add_argument("--show", action="store_true", help="only print the tables of what is recorded")
    parser.add_argument("--write-docs", action="store_true", help="only write them into docs/benchmarks.md")
    parser.add_argument("--models", type=words, help="comma-separated, e.g. 3b,7b or 3b-8bit")
    parser.add_argument("--caps", type=words, help="comma-separated: shares of the model, sizes, none")
    parser.add_argument("--engines", type=words, help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="for AirLLM")
    parser.add_argument("--new-tokens", type=int, help="default: the workload's")
    parser.add_argument("--slow-tokens", type=int, default=3, help="at most, for AirLLM")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"), help="what peers.sh made")
    parser.add_argument("--bench", type=Path, default=BENCH, help="where the weights are or go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of compare.jsonl")
    parser.add_argument("--series", help="go on with a recorded series, e.g. to add an engine; default: a new one")
    given = parser.parse_args()
    for asked, known in ((given.workloads, WORKLOADS), (given.engines or [], ENGINES)):
        if not given.show and (unknown := [name for name in asked if name not in known]):
            parser.error(f"there is no {', '.join(unknown)}, but {', '.join(known)}")
    if not (given.workloads or given.show or given.write_docs):
        parser.error(f"name a workload: {', '.join(WORKLOADS)}")
    given.series = given.series or f"{stamp()['date']}-{os.getpid()}"
    return given


def main() -> None:
    given = arguments()
    file = given.results / "compare.jsonl"
    if given.write_docs:
        PAGE.write_text(tables.rewritten(PAGE.read_text(), tables.read_lines(file)))
        return
    if not given.show:
        for name, case, pythons in cases(given):
            measured(name, case, pythons, given)
    lines = tables.read_lines(file)
    wanted = lines if given.show else [line for line in lines if line["series"] == given.series]
    print("\n".join(tables.plain(wanted, name) for name in given.workloads or [""]))


if __name__ == "__main__":
    run_main(main)
