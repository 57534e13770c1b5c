"""How long a token takes from 8B to 2.8T, on five machines, and how right such a forecast is where we measured.

    python benchmarks/scale.py                                   # the tables, and into docs/scale.md
    python benchmarks/scale.py --check                           # predicted beside measured, from results/*.jsonl
    python benchmarks/scale.py --measure MODEL@2GB MODEL@14GB    # runs of `lamina bench`, into results/forecast.jsonl

The first plans every model of passes.py in every form for every machine with Lamina's own planner, and asks the plan
how long a token takes. One token a pass: no speculation, no batch.

--check takes every run of `lamina bench` that recorded a prediction in results/forecast.jsonl, compare.jsonl,
stores.jsonl and experts.jsonl. Its `predicted_seconds_per_token` is the planner's model of time with the drive's rate
measured between that run's steps, the rates of computing measured when the model was loaded, and the experts really
read: the model of time is checked, not the routing, nor whether a shared drive stays as fast as it was.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lamina_cli
from passes import CONTEXT, FORMS, MODELS, Model, budget, schedule
from report import HERE, RESULTS, MeasuringError, gigabytes, parse_size, record, run_main, seconds, stamp, versions

from lamina.errors import BudgetError
from lamina.plan.forecast import Hardware
from lamina.plan.plan import Plan
from lamina.plan.planner import make_plan
from lamina.plan.schedule import Schedule
from lamina.runtime.rates import PLUMBING, READING_CORES

PAGE = HERE.parent / "docs" / "scale.md"
FILES = ("forecast", "compare", "stores", "experts")
GB = 10**9
UNPACKED_BY_A_CORE = {"lossless": 4.2e9, "8bit": 9.5e9, "4bit": 9.5e9}  # B/s of bf16 made and multiplied, stores.jsonl
WANTED_ERROR = 0.15  # the error that is wanted


@dataclass(frozen=True)
class Machine:
    """A class of machines; memory is what is given to Lamina, the rest is the system's."""

    name: str
    disk: float
    memory: int
    memory_rate: float
    cores: int
    device_memory: int | None = None
    device_rate: float = 0.0
    link: float = 25e9
    note: str = ""

    def hardware(self, form: str, schedule: Schedule) -> Hardware:
        """Its rates for weights in that form. A product cannot be quicker than memory gives what is unpacked."""
        rate = self.device_rate if self.device_memory else self.memory_rate
        unpacked = rate
        if form in UNPACKED_BY_A_CORE:
            own = [w for w in schedule.weights.values() if w.packed]
            share = sum(w.unpacked_nbytes for w in own) / sum(w.stored_nbytes for w in own)
            unpacked = rate if self.device_memory else min(UNPACKED_BY_A_CORE[form] * self.cores, rate * share)
        cost = 0.0 if self.device_memory else READING_CORES / self.cores
        return Hardware(self.disk, rate, self.link, unpacked, PLUMBING * 1.1e-6, cost)


MACHINES = (
    Machine("phone", 1e9, 6 * GB, 25e9, 4, note="UFS or a small SSD; 8 GB"),
    Machine("laptop", 3.5e9, 12 * GB, 50e9, 8, note="NVMe of PCIe 3; 16 GB"),
    Machine("desktop", 7e9, 56 * GB, 60e9, 8, 22 * GB, 900e9, note="NVMe of PCIe 4; 64 GB; a GPU of 24 GB"),
    Machine("workstation", 14e9, 112 * GB, 150e9, 16, note="NVMe of PCIe 5; 128 GB"),
    Machine("server", 28e9, 232 * GB, 250e9, 32, note="four NVMe of PCIe 4 as one; 256 GB"),
)


def plan(model: Model, form: str, machine: Machine, made: Schedule | None = None) -> Plan | None:
    """The plan; None where the machine has too little memory."""
    made = made or schedule(model, form)
    given = budget(model, made.scratch_bytes, machine.memory, machine.device_memory)
    try:
        return make_plan(made, given, machine.hardware(form, made))
    except BudgetError:
        return None


def cell(found: Plan | None) -> str:
    if found is None:
        return "too large"
    return seconds(found.predicted_seconds_per_token) + ("" if found.bytes_read_per_pass else " *")


def markdown(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---", *["---:"] * (len(head) - 1)), *rows)]
    return "\n".join(lines)


def models_table(models: tuple[Model, ...] = MODELS) -> str:
    """What each model is: bytes, and bytes that a token needs."""
    rows = []
    for model in models:
        found = [plan(model, form, replace(MACHINES[-1], memory=10**14)) for form in FORMS]
        plain = found[0]
        assert plain is not None
        sizes = [gigabytes(each.model_bytes) if each else "-" for each in found]
        rows.append((model.name, f"{plain.parameters / 1e9:.0f}B", *sizes, gigabytes(plain.active_bytes_per_token),
                     model.source))  # fmt: skip
    return markdown(rows, ("model", "parameters", *FORMS, "a token needs, bf16", "sizes from"))


def machine_table() -> str:
    def rate(value: float) -> str:
        return f"{value / 1e9:g} GB/s"

    rows = []
    for m in MACHINES:
        device = (
            f"{m.device_memory / 1e9:g} GB at {rate(m.device_rate)}, link {rate(m.link)}" if m.device_memory else "-"
        )
        rows.append((f"{m.name}: {m.note}", rate(m.disk), f"{m.memory / 1e9:g} GB", rate(m.memory_rate), str(m.cores),
                     device))  # fmt: skip
    return markdown(rows, ("machine", "drive", "given to Lamina", "products of one row", "cores", "accelerator"))


def scale_tables(models: tuple[Model, ...] = MODELS, machines: tuple[Machine, ...] = MACHINES) -> str:
    """For each machine, s/token of every model in every form."""
    rows: dict[str, list[tuple[str, ...]]] = {machine.name: [] for machine in machines}
    for model in models:
        made = {form: schedule(model, form) for form in FORMS}
        for machine in machines:
            cells = (cell(plan(model, form, machine, made[form])) for form in FORMS)
            rows[machine.name].append((model.name, *cells))
    return "\n\n".join(f"### {m.name}: {m.note}\n\n" + markdown(rows[m.name], ("s/token", *FORMS)) for m in machines)


def measured() -> Iterator[dict[str, Any]]:
    """Every recorded run of `lamina bench` that has both figures, wherever in its line it is."""

    def runs(value: Any, name: str) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            name = str(value.get("model") or value.get("checkpoint") or name)
            if value.get("seconds_per_token") and value.get("planned_seconds_per_token"):
                yield {**value, "model": Path(name).name}
                return
            for key, each in value.items():
                yield from runs(each, key if isinstance(each, dict) and name == "" else name)
        elif isinstance(value, list):
            for each in value:
                yield from runs(each, name)

    for file in FILES:
        path = RESULTS / f"{file}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            for run in runs(json.loads(line), ""):
                yield {**run, "file": file}


def newest(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs made for this page, the newest of each model and budget: older ones had older constants."""
    kept: dict[object, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        key = (run["model"], run.get("memory_budget_bytes")) if run["file"] == "forecast" else place
        kept.pop(key, None)
        kept[key] = run
    return list(kept.values())


def check_table(runs: list[dict[str, Any]]) -> str:
    """Measured, predicted, the error of each; the worst and the median below."""
    if not runs:
        return "No run with a prediction is recorded yet: `python benchmarks/scale.py --measure MODEL@MEMORY`."
    rows, errors, planned = [], [], []
    for run in runs:
        took = run["seconds_per_token"]
        errors.append(run["predicted_seconds_per_token"] / took - 1)
        planned.append(run["planned_seconds_per_token"] / took - 1)
        rows.append((
            run["model"], gigabytes(run.get("memory_budget_bytes")), gigabytes(run.get("bytes_read_per_pass")),
            seconds(took), seconds(run["predicted_seconds_per_token"]), f"{errors[-1]:+.0%}",
            seconds(run["planned_seconds_per_token"]), f"{planned[-1]:+.0%}",
        ))  # fmt: skip
    head = ("model", "budget", "read a token", "measured, s", "predicted", "error", "planned at load", "error")
    said = [summary(errors, "predicted")]
    for what, reads in (("predicted where the disk is read", True), ("predicted where all is in memory", False)):
        of_these = [e for e, run in zip(errors, runs, strict=True) if bool(run.get("bytes_read_per_pass")) is reads]
        said += [summary(of_these, what)] if of_these else []
    return "\n".join([markdown(rows, head), "", *said, summary(planned, "planned at load")])


def summary(errors: list[float], what: str) -> str:
    sizes = sorted(abs(error) for error in errors)
    within = sum(size <= WANTED_ERROR for size in sizes)
    return (f"As {what}: median error {statistics.median(sizes):.0%}, worst {sizes[-1]:.0%}, "
            f"{within} of {len(sizes)} within {WANTED_ERROR:.0%}.")  # fmt: skip


def write(page: Path, marker: str, text: str) -> None:
    """Put `text` between the page's two markers of that name."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    old = page.read_text() if page.exists() else ""
    if begin not in old or end not in old:
        raise MeasuringError(f"{page.name} has no place for the tables: wanted the lines {begin} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def measure(cases: list[str], steps: int) -> None:
    for case in cases:
        folder, at, memory = case.rpartition("@")
        if not at:
            raise MeasuringError(f"{case} is not MODEL@MEMORY, such as llama-3b@2GB")
        line = lamina_cli.bench(Path(folder), parse_size(memory), steps + 1)
        if line.get("failure"):
            raise MeasuringError(f"lamina bench {folder} --memory {memory}: {line['failure']}")
        record("forecast", stamp() | {"packages": versions(), "model": Path(folder).name} | line)
        took, said = line["seconds_per_token"], line["predicted_seconds_per_token"]
        print(f"{Path(folder).name} in {memory}: {seconds(took)} s/token, predicted {seconds(said)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measured beside predicted, into docs/scale.md")
    parser.add_argument("--measure", nargs="+", metavar="MODEL@MEMORY", help="run `lamina bench` and record it")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a measured run")
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.steps)
        return
    if given.check:
        text = check_table(newest(measured()))
        write(PAGE, "check", text)
    else:
        parts = {"machines": machine_table(), "models": models_table(), "scale": scale_tables()}
        for marker, part in parts.items():
            write(PAGE, marker, part)
        text = "\n\n".join(parts.values())
    print(text)
    print(json.dumps({"context_tokens": CONTEXT, "page": PAGE.name}))


if __name__ == "__main__":
    run_main(main)
