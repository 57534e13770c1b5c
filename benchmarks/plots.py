"""docs/benchmarks-MODEL.svg out of the recorded lines: s/token of each engine over the memory that it was given.

    pip install -e '.[bench]'
    python benchmarks/plots.py                          # every dense model in results/compare.jsonl
    python benchmarks/plots.py --results DIR --to DIR

The same lines give the same bytes, whenever it is run. What failed at a cap is a cross above.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import tables
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import HERE, RESULTS, MeasuringError, run_main

FIGURE = "seconds_per_token"
INCHES = (8, 4.6)
UNCAPPED = 1.12  # where the runs without a cap stand: this many times the model's size
DARK = "#1f2937"
LOOKS = {  # of each engine: colour, marker; distinct without colours as well
    "lamina": ("#c2410c", "o"),
    "llama_cpp": ("#1d4ed8", "s"),
    "llama_cpp_nommap": ("#60a5fa", "v"),
    "accelerate_disk": ("#047857", "^"),
    "ollm": ("#7c3aed", "P"),
    "airllm": ("#6b7280", "D"),
    "transformers": ("#b45309", "*"),
    tables.DISK: ("#9ca3af", ""),
}


def points(groups: dict[tables.Key, list[tables.Line]]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """For each engine, in the order of LOOKS: the memory in GB and the row of the table there."""
    given = [key.asked_cap_bytes for key in groups if key.asked_cap_bytes is not None]
    model = next(iter(groups.values()))[0]["model_bytes"]
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {name: [] for name in LOOKS}
    for key, lines in groups.items():
        at = (
            max([UNCAPPED * model, *(1.05 * cap for cap in given)])
            if key.asked_cap_bytes is None
            else key.asked_cap_bytes
        )
        for name, row in tables.summarize(lines, FIGURE).items():
            if name in found:
                found[name].append((at / 1e9, row))
    return {name: sorted(each, key=lambda point: point[0]) for name, each in found.items() if each}


def draw(axes: Axes, groups: dict[tables.Key, list[tables.Line]]) -> None:
    found = points(groups)
    good = [row[FIGURE]["max"] for each in found.values() for _, row in each if FIGURE in row]
    if not good:
        raise MeasuringError("no run of this model came to its end: nothing to draw")
    top = 1.5 * max(good)
    for name, each in found.items():
        colour, marker = LOOKS[name]
        ours = name == "lamina"
        drawn = [(at, row[FIGURE]) for at, row in each if FIGURE in row]
        axes.errorbar(
            [at for at, _ in drawn],
            [figure["median"] for _, figure in drawn],
            yerr=[
                [figure["median"] - figure["min"] for _, figure in drawn],
                [figure["max"] - figure["median"] for _, figure in drawn],
            ],
            label=tables.NAMES[name],
            color=colour,
            marker=marker or None,
            linestyle="--" if name == tables.DISK else "-",
            linewidth=2.4 if ours else 1.4,
            markersize=6,
            capsize=2,
            zorder=3 if ours else 2,
        )
        failed = [at for at, row in each if FIGURE not in row]
        axes.plot(failed, [top] * len(failed), color=colour, marker="x", markersize=8, linestyle="")
    axes.set_yscale("log")
    places = sorted({at for each in found.values() for at, _ in each})
    uncapped = any(key.asked_cap_bytes is None for key in groups)
    names = [f"{at:.2g}" for at in places[: len(places) - uncapped]] + ["no cap"] * uncapped
    axes.set_xticks(places, names)


def plot(model: str, groups: dict[tables.Key, list[tables.Line]], out: Path) -> None:
    """Write one picture."""
    settings = {
        "svg.hashsalt": "lamina",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": DARK,
        "axes.labelcolor": DARK,
        "xtick.color": DARK,
        "ytick.color": DARK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=INCHES, facecolor="white", layout="constrained")
        axes = figure.subplots()
        draw(axes, groups)
        size = tables.gb(next(iter(groups.values()))[0]["model_bytes"])
        axes.set_title(f"{model}, {size} GB of weights: seconds per token, less is better", fontsize=12, loc="left")
        failed = any(line["failure"] for lines in groups.values() for line in lines)
        axes.set_xlabel("memory given, page cache counted, GB" + "   (x: killed for memory, or failed)" * failed)
        axes.set_ylabel("s/token")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(True, axis="y", which="both", color="#e5e7eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=10)
        figure.savefig(out, metadata={"Date": None, "Creator": None})
    print(f"{out.name}: {out.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of compare.jsonl")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs", help="folder of the pictures")
    given = parser.parse_args()
    found = tables.sections(tables.read_lines(given.results / "compare.jsonl"), "dense")
    if not found:
        raise MeasuringError(
            f"{given.results / 'compare.jsonl'} has no line of the workload dense: run compare.py dense"
        )
    for model in dict.fromkeys(key.model for key in found):
        groups = {key: lines for key, lines in found.items() if key.model == model}
        plot(model, groups, given.to / f"benchmarks-{model}.svg")


if __name__ == "__main__":
    run_main(main)
