"""The ceiling: how fast this drive gives a checkpoint's bytes, with O_DIRECT, by block size and number of threads.

    python benchmarks/disk.py .cache/bench/llama-3b
    python benchmarks/disk.py .cache/bench/llama-3b --blocks 8 --threads 1,8 --runs 3 --bytes 6GB

Threads take the next block from one counter, as a reader would; each has one aligned buffer to read into again and
again. Settings alternate, so that a slow spell of a shared drive meets all of them; each run goes on where the last one
ended, so that a cache behind the drive helps little. One row per setting: GB/s, median (least - greatest).
"""

import argparse
import contextlib
import itertools
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from report import BENCH, MeasuringError, make_checkpoint, parse_size, record, run_main, spread, stamp, table

ALIGNMENT = 4096
HUGE = 2 << 20
Block = tuple[int, int, int]  # file descriptor, offset, length


def blocks_of(descriptors: list[int], size: int) -> list[Block]:
    """Every whole aligned block of the files, in order."""
    return [
        (descriptor, at, size)
        for descriptor in descriptors
        for at in range(0, os.fstat(descriptor).st_size - size + 1, size)
    ]


def read_blocks(blocks: Iterator[Block], lock: threading.Lock, view: memoryview, failed: list[OSError]) -> None:
    """Read until there are no more blocks; `preadv` releases the GIL."""
    while True:
        with lock:
            block = next(blocks, None)
        if block is None:
            return
        descriptor, at, size = block
        try:
            got = os.preadv(descriptor, [view[:size]], at)
            if got != size:
                raise OSError(f"read {got} of {size} bytes at {at}")
        except OSError as error:
            failed.append(error)
            return


def read_rate(blocks: list[Block], buffers: list[memoryview]) -> float:
    """Bytes per second of reading `blocks` with one thread per buffer."""
    source, lock = iter(blocks), threading.Lock()
    failed: list[OSError] = []
    threads = [threading.Thread(target=read_blocks, args=(source, lock, buffer, failed)) for buffer in buffers]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sum(size for _, _, size in blocks) / (time.perf_counter() - began)


def touched_buffers(count: int, size: int) -> list[memoryview]:
    """Page-aligned memory that is there already, in huge pages where they are to be had.

    The drive reads into them in longer runs: on a virtual one 2.9 GB/s were seen where small pages gave 2.0.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, count * size + HUGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    memory[::ALIGNMENT] = b"\1" * len(range(0, len(memory), ALIGNMENT))
    return [memoryview(memory)[i * size : (i + 1) * size] for i in range(count)]


def open_direct(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))


def measure(
    files: list[Path], blocks: list[int], threads: list[int], total: int, runs: int
) -> dict[tuple[int, int], list[float]]:
    """Rates for each (block bytes, threads), `runs` of each, in turns."""
    descriptors = [open_direct(path) for path in files]
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in itertools.product(blocks, threads)}
    at = {block: random.randrange(10**6) for block in blocks}
    try:
        for run in range(runs):
            if runs > 1:
                print(f"disk.py: run {run + 1} of {runs}", file=sys.stderr)
            for block, count in rates:
                ring = blocks_of(descriptors, block)
                if not ring:
                    raise MeasuringError(f"no file of the checkpoint has {block >> 20} MiB to read")
                begin, need = at[block], max(1, total // block)
                taken = [ring[(begin + i) % len(ring)] for i in range(min(need, len(ring)))]
                at[block] = (begin + len(taken)) % len(ring)
                rates[block, count].append(read_rate(taken, touched_buffers(count, block)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return rates


def rate_now(checkpoint: Path, total: int = 10**9) -> float | None:
    """Bytes per second at this moment, eight threads with 8 MiB each: what a run's figure can be held against.

    None for a checkpoint too small to say.
    """
    files = [path for path in sorted(checkpoint.glob("*.safetensors")) if path.stat().st_size > 64 << 20]
    if not files:
        return None
    (rates,) = measure(files, [8 << 20], [8], total, 1).values()
    return rates[0]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=BENCH / "llama-3b")
    parser.add_argument("--blocks", type=numbers, default=[1, 4, 8, 16], help="MiB, comma-separated")
    parser.add_argument("--threads", type=numbers, default=[1, 2, 4, 8, 16], help="comma-separated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bytes", type=parse_size, default=2 * 10**9, help="read in each run")
    given = parser.parse_args()
    files = sorted(make_checkpoint(given.checkpoint, "3b").glob("*.safetensors"))
    rates = measure(files, [size << 20 for size in given.blocks], given.threads, given.bytes, given.runs)
    rows, settings = [], []
    for block in given.blocks:
        row = [f"{block} MiB"]
        for count in given.threads:
            found = spread(rates[block << 20, count])
            low, middle, high = (found[part] / 1e9 for part in ("min", "median", "max"))
            row.append(f"{middle:.2f} ({low:.2f} - {high:.2f})")
            settings.append({"block_bytes": block << 20, "threads": count, "bytes_per_second": found})
        rows.append(row)
    print(table(rows, ["GB/s", *(f"{count} thread{'s' * (count > 1)}" for count in given.threads)]))
    line = stamp() | {"bytes": given.bytes, "runs": given.runs, "settings": settings}
    record("disk", line)
    print(json.dumps(line))


if __name__ == "__main__":
    run_main(main)
