"""What every benchmark here says about its run: the machine, the versions, a table, and one JSON line.

Standard library only: these scripts stay small, because a child process begins with its parent's peak memory.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BENCH = Path(".cache/bench")
PACKAGES = ("lamina", "torch", "transformers", "accelerate", "safetensors", "airllm", "ollm", "llama_cpp_python")
_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", 1)
    for base, names in ((1000, (letter, letter + "B")), (1024, (letter + "IB",)))
    for name in names
}


class MeasuringError(Exception):
    """A measurement could not be made; the message says which and why."""


def parse_size(text: str) -> int:
    """`"3GB"` is 3 x 10^9 bytes, `"3GiB"` 3 x 2^30: as in Lamina itself."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 3GB or 3GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def gigabytes(nbytes: object) -> str:
    return f"{nbytes / 1e9:.2f} GB" if isinstance(nbytes, int | float) else "-"


def seconds(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def machine() -> dict[str, object]:
    """The hardware and kernel that a figure belongs to."""
    cpu = platform.processor()
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def versions(python: str | None = None) -> dict[str, str]:
    """The versions of the packages that matter, here or in the environment of another interpreter."""
    if python is not None and python != sys.executable:
        code = "import json, report; print(json.dumps(report.versions()))"
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=HERE)
        return dict(json.loads(run.stdout)) if run.returncode == 0 else {"error": run.stderr[-200:]}
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def stamp() -> dict[str, object]:
    """When, where and how: what each recorded line carries."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "command": [Path(word).name if word.startswith("/") else word for word in sys.argv],
    }


def record(name: str, line: dict[str, object], folder: Path = RESULTS) -> None:
    """Append one JSON line to NAME.jsonl in the folder of results."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as out:
        out.write(json.dumps(line) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """A table for people: the first column to the left, the rest to the right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def need_disk(folder: Path, nbytes: int, what: str) -> None:
    """See that `what` finds room beside `folder`.

    Raises:
        MeasuringError: it does not; the message says how much it takes and how much there is.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if (free := shutil.disk_usage(place).free) < nbytes:
        raise MeasuringError(
            f"{what} takes {gigabytes(nbytes)}, but {place} has {gigabytes(free)} free: "
            "free some, or choose another disk"
        )


def make_checkpoint(
    folder: Path, shape: str, *, sparse: bool = False, gguf: bool = False, script: str = "checkpoints.py"
) -> Path:
    """`folder` with random weights of a named shape, written first where it is not there (in a process of its own)."""
    done = (folder / "config.json").exists() and (not gguf or folder.with_name(folder.name + ".gguf").exists())
    if not done:
        print(f"writing {folder} ({shape}{', sparse' if sparse else ''})", file=sys.stderr)
        flags = ["--sparse"] * sparse + ["--gguf"] * gguf
        written = subprocess.run(
            [sys.executable, HERE / script, folder, "--shape", shape, *flags], stderr=subprocess.PIPE, text=True
        )
        if written.returncode:
            said = [line for line in written.stderr.splitlines() if line.strip()]
            raise MeasuringError(said[-1] if said else f"{script} could not write {folder}")
    return folder


def run_main(main: Callable[[], None]) -> None:
    """Run a script: the cgroups go when it is terminated, and a measurement that failed is one clear line."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        main()
    except MeasuringError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
