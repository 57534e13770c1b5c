"""From the recorded lines of `compare.py` to tables, for a terminal and for docs/benchmarks.md.

Not a script, and standard library only: the tests check that the page says what the lines say.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import MeasuringError, spread, table

Line = dict[str, Any]
DISK = "disk"
MARKED = re.compile(r"(<!-- compare:([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SPREAD_KEYS = ("seconds_per_token", "time_to_first_token_seconds", "wall_seconds", "load_seconds", "tokens_per_second")
PEAK_KEYS = ("peak_rss_bytes", "cgroup_peak_bytes")
NAMES = {
    "lamina": "Lamina",
    "llama_cpp": "llama.cpp",
    "llama_cpp_nommap": "llama.cpp, no mmap",
    "accelerate_disk": "accelerate, disk",
    "transformers": "transformers, all in memory",
    "airllm": "AirLLM",
    "airllm_457": "AirLLM, transformers 4.57",
    "ollm": "oLLM",
    DISK: "the disk itself",
}


@dataclass(frozen=True)
class Key:
    """What belongs into one table."""

    workload: str
    model: str
    asked_cap_bytes: int | None


def read_lines(file: Path) -> list[Line]:
    """The lines of a results file; none where there is no file."""
    return [json.loads(text) for text in file.read_text().splitlines() if text] if file.exists() else []


def newest(lines: Iterable[Line]) -> dict[Key, list[Line]]:
    """The lines that count: for each workload, model and cap those of the series that was recorded last."""
    groups: dict[Key, list[Line]] = {}
    for line in lines:
        groups.setdefault(Key(line["workload"], line["model"], line["asked_cap_bytes"]), []).append(line)
    found = {}
    for key, group in groups.items():
        last = max(group, key=lambda line: line["date"])["series"]
        found[key] = [line for line in group if line["series"] == last]
    return found


def summarize(lines: Sequence[Line], figure: str) -> dict[str, Line]:
    """Per engine: medians and spread, how many times Lamina's figure it needs, and what failed and why."""
    summary: dict[str, Line] = {}
    for name in dict.fromkeys(line["engine"] for line in lines):
        own = [line for line in lines if line["engine"] == name]
        good = [line for line in own if line["failure"] is None]
        row: Line = {"runs": len(own), "failed": len(own) - len(good)}
        row["failure"] = next((line["failure"] for line in own if line["failure"]), None)
        for key in SPREAD_KEYS:
            if values := numbers(good, key):
                row[key] = spread(values)
        for key in PEAK_KEYS:
            row[key] = max(numbers(good or own, key), default=None)
        row["read_bytes_per_pass"] = median([read for line in good if (read := read_a_pass(line)) is not None])
        row["passes"] = median(numbers(good, "passes"))
        row["disk_bytes_per_second"] = median([rate for line in own if (rate := disk_rate(line)) is not None])
        row["tokens"] = good[0].get("tokens") if good else None
        summary[name] = row
    add_comparisons(summary, figure)
    if disk := disk_row(lines, summary, figure):
        summary[DISK] = disk
    return summary


def add_comparisons(summary: dict[str, Line], figure: str) -> None:
    ours = summary.get("lamina", {})
    for row in summary.values():
        if figure in ours and figure in row:
            row["times_lamina"] = row[figure]["median"] / ours[figure]["median"]
        row["same"] = agreement(row["tokens"], ours.get("tokens"))


def disk_row(lines: Sequence[Line], summary: dict[str, Line], figure: str) -> Line | None:
    """What the bare disk takes for the bytes of a pass of Lamina, at the rate that its run saw in turns with its steps.

    Where a run does not read the bare disk itself, it is the rate right before and after it.
    """
    took = []
    for line in lines:
        if line["engine"] == "lamina" and line["failure"] is None:
            read, rate = line.get("bytes_read_per_pass"), line.get("disk_bytes_per_second") or disk_rate(line)
            if read and rate:
                took.append(read / rate)
    if not took or figure == "wall_seconds" or "batch_seconds" in lines[0] or figure not in summary["lamina"]:
        return None
    found = spread(took)
    return {
        figure: found,
        "times_lamina": found["median"] / summary["lamina"][figure]["median"],
        "disk_bytes_per_second": summary["lamina"]["disk_bytes_per_second"],
        "read_bytes_per_pass": summary["lamina"]["read_bytes_per_pass"],
        "runs": len(took),
        "failed": 0,
    }


def numbers(lines: Iterable[Line], key: str) -> list[float]:
    return [value for line in lines if isinstance(value := line.get(key), int | float)]


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def disk_rate(line: Line) -> float | None:
    """Bytes per second of the bare drive around a run."""
    rates = [line.get(f"bare_{when}_bytes_per_second") for when in ("before", "after")]
    return statistics.mean(found) if (found := [rate for rate in rates if rate]) else None


def read_a_pass(line: Line) -> float | None:
    """Lamina counts a decode step itself, for its run reads the bare disk too; else the run's bytes over its passes."""
    if line.get("bytes_read_per_pass") is not None and line["figure"] != "wall_seconds":
        return float(line["bytes_read_per_pass"])
    passes, read = line.get("passes") or line.get("new_tokens"), line.get("read_bytes")
    return read / passes if read is not None and passes else None


def agreement(tokens: Sequence[Any] | None, others: Sequence[Any] | None) -> str:
    """How many leading tokens are Lamina's, of those that can be compared; of a batch, over all its sequences."""
    if not tokens or not others:
        return "-"
    many = isinstance(tokens[0], list)
    pairs = list(zip(tokens, others, strict=False)) if many else [(tokens, others)]
    lengths = [min(len(one), len(other)) for one, other in pairs]
    same = [
        next((i for i in range(length) if one[i] != other[i]), length)
        for (one, other), length in zip(pairs, lengths, strict=True)
    ]
    return f"{sum(same)}/{sum(lengths)}"


def figure_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def gb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def ranged(row: Line, key: str) -> str:
    found = row.get(key)
    if not found:
        return row.get("failure") or "-"
    middle = figure_text(found["median"])
    return (
        middle
        if row["runs"] - row["failed"] < 2
        else f"{middle} ({figure_text(found['min'])} - {figure_text(found['max'])})"
    )


def middle(row: Line, key: str) -> str:
    return figure_text(row[key]["median"]) if row.get(key) else "-"


HEADS = {
    "seconds_per_token": "s/token",
    "time_to_first_token_seconds": "first token, s",
    "wall_seconds": "process, s",
}


def columns(figure: str, batch: bool) -> list[str]:
    """The heads of a table; what is compared comes first."""
    others = ["tokens/s", "passes"] if batch else [HEADS["time_to_first_token_seconds"]]
    costs = ["load, s", "peak RSS, GB", "cgroup peak, GB", "read a pass, GB", "disk, GB/s", "same", "runs"]
    return ["engine", HEADS[figure], "x Lamina", *[head for head in others if head != HEADS[figure]], *costs]


def cells(name: str, row: Line, figure: str) -> dict[str, str]:
    """A row's texts by head."""
    return {
        "engine": NAMES.get(name, name),
        HEADS["time_to_first_token_seconds"]: middle(row, "time_to_first_token_seconds"),
        "x Lamina": figure_text(row.get("times_lamina")),
        "tokens/s": middle(row, "tokens_per_second"),
        "passes": figure_text(row.get("passes")),
        "load, s": middle(row, "load_seconds"),
        "peak RSS, GB": gb(row.get("peak_rss_bytes")),
        "cgroup peak, GB": gb(row.get("cgroup_peak_bytes")),
        "read a pass, GB": gb(row.get("read_bytes_per_pass")),
        "disk, GB/s": gb(row.get("disk_bytes_per_second")),
        "same": row.get("same", "-"),
        "runs": f"{row['runs'] - row['failed']}/{row['runs']}" if row["failed"] else str(row["runs"]),
        HEADS[figure]: ranged(row, figure),
    }


def rows_of(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one table: by the figure that is compared, what failed last."""
    figure = lines[0]["figure"]
    summary = summarize(lines, figure)
    heads = columns(figure, any("batch_seconds" in line for line in lines))
    ordered = sorted(summary, key=lambda name: summary[name][figure]["median"] if figure in summary[name] else 1e99)
    texts = [cells(name, summary[name], figure) for name in ordered]
    return heads, [[text[head] for head in heads] for text in texts]


def title(key: Key, lines: Sequence[Line]) -> str:
    """What was asked: the model, what it was given, and whether the cap was real."""
    model = f"{key.model} ({gb(lines[0]['model_bytes'])} GB)"
    if key.asked_cap_bytes is None:
        return f"{key.workload}, {model}, no cap"
    of = "of GPU memory" if lines[0].get("on_device") else "given"
    kept = (
        ""
        if lines[0].get("on_device") or all(line["cap_bytes"] for line in lines)
        else " (no right to a cgroup: uncapped)"
    )
    return f"{key.workload}, {model}, {gb(key.asked_cap_bytes)} GB {of}{kept}"


def origin(lines: Sequence[Line]) -> str:
    """When and where the lines were recorded, with which versions."""
    machine = lines[0]["machine"]
    packages: dict[str, set[str]] = {}
    for line in lines:
        for name, version in line["packages"].items():
            packages.setdefault(name, set()).add(version)
    said = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(packages.items()))
    return (
        f"{max(line['date'] for line in lines)[:10]}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB of memory, Linux {machine['kernel']}; {said}."
    )


def sections(lines: Iterable[Line], name: str = "") -> dict[Key, list[Line]]:
    """The newest lines by table; `name` is a workload, or a workload and a model: `dense-3b`."""
    found = {
        key: group for key, group in newest(lines).items() if name in ("", key.workload, f"{key.workload}-{key.model}")
    }
    return dict(
        sorted(found.items(), key=lambda item: (item[0].workload, item[0].model, item[0].asked_cap_bytes or 1e99))
    )


def plain(lines: Iterable[Line], name: str = "") -> str:
    """The tables for a terminal."""
    parts = []
    for key, group in sections(lines, name).items():
        heads, rows = rows_of(group)
        parts.append(f"{title(key, group)}\n{table(rows, heads)}\n{origin(group)}\n")
    return "\n".join(parts)


def markdown(lines: Iterable[Line], name: str) -> str:
    """The tables for a page, and one line for each on where they come from."""
    found = sections(lines, name)
    if not found:
        return "Not measured yet.\n"
    parts = []
    for key, group in found.items():
        heads, rows = rows_of(group)
        rule = ["---", *["---:" for _ in heads[1:]]]
        body = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, rule, *rows)
        )
        parts.append(f"**{title(key, group)}**\n\n{body}\n\n{origin(group)}\n")
    return "\n".join(parts)


def rewritten(page: str, lines: Sequence[Line]) -> str:
    """A page with the tables between its `<!-- compare:NAME -->` and `<!-- end -->` made anew."""
    if "<!-- compare:" in page and not MARKED.search(page):
        raise MeasuringError("the page has a <!-- compare:NAME --> without an <!-- end --> after it")
    return MARKED.sub(lambda found: f"{found[1]}\n{markdown(lines, found[2])}\n{found[3]}", page)
