"""How fast weights come out of their codecs, beside the memory that they are read from: unpacking and one product.

    python benchmarks/codecs.py
    python benchmarks/codecs.py --rows 4096 --columns 4096 --tokens 1,16 --rounds 30 --threads 1

The matrix is that of an MLP of 7B, normally distributed. Per codec: bytes to those of bf16; encoding; unpacking in
blocks of 256 rows over and over into the same two megabytes, as a streamed layer is; `linear` of some tokens, the whole
matrix, and in brackets what unpacking block by block and torch's own product take. Everything takes turns, the best of
all rounds counts: a shared machine has slow moments. `plain` is torch's product on bf16, `copy` and `read` the memory
alone.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator

import torch
from report import MeasuringError, record, run_main, stamp, table
from torch.nn import functional as F
from turns import in_turns

from lamina.codec import AFFINE, LOSSLESS, Codec, native

BLOCK_ROWS = 256


class Matrix:
    """A weight in one codec, its panels at real size."""

    def __init__(self, codec: Codec, weight: torch.Tensor) -> None:
        self.codec, self.weight = codec, weight
        self.rows, self.columns = weight.shape
        began = time.perf_counter()
        if codec is LOSSLESS:
            need = LOSSLESS.need(weight, BLOCK_ROWS)
            self.panels, self.step = LOSSLESS.encode(weight, BLOCK_ROWS, need), 1
        else:
            self.panels, self.step = AFFINE[codec.name].encode(weight), BLOCK_ROWS
        self.encode_rate = weight.nbytes / (time.perf_counter() - began)
        self.block = torch.empty(BLOCK_ROWS, self.columns, dtype=torch.bfloat16)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """First rows and unpacked blocks, each over the last."""
        for first in range(0, self.rows, BLOCK_ROWS):
            panels = self.panels[first // BLOCK_ROWS * self.step :][: self.step]
            block = self.block[: min(BLOCK_ROWS, self.rows - first)]
            self.codec.unpack(panels, len(block), self.columns, block)
            yield first, block

    def unpack(self) -> None:
        for _ in self.blocks():
            pass

    def product_by_blocks(self, x: torch.Tensor, out: torch.Tensor) -> None:
        for first, block in self.blocks():
            out[:, first : first + len(block)] = F.linear(x, block)

    def linear(self, x: torch.Tensor, out: torch.Tensor) -> bool:
        return self.codec.linear(x, self.panels, self.rows, out)


def least_of(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each."""
    best = dict.fromkeys(tasks, float("inf"))
    for turn, name in in_turns(list(tasks), rounds + 1):
        began = time.perf_counter()
        tasks[name]()
        if turn:  # the first warms up
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def tasks_of(matrices: list[Matrix], weight: torch.Tensor, tokens: list[int]) -> dict[str, Callable[[], object]]:
    copied, words = torch.empty_like(weight), weight.view(torch.int64)
    tasks: dict[str, Callable[[], object]] = {"copy": lambda: copied.copy_(weight), "read": lambda: words.amax()}
    for matrix in matrices:
        tasks[f"{matrix.codec.name} unpack"] = matrix.unpack
    for count in tokens:
        x, out = torch.randn(count, weight.shape[1]).bfloat16(), torch.empty(count, weight.shape[0]).bfloat16()
        tasks[f"plain {count}"] = lambda x=x: F.linear(x, weight)
        for matrix in matrices:
            if matrix.linear(x, out):
                tasks[f"{matrix.codec.name} {count}"] = lambda m=matrix, x=x, out=out: m.linear(x, out)
            tasks[f"{matrix.codec.name} blocks {count}"] = lambda m=matrix, x=x, out=out: m.product_by_blocks(x, out)
    return tasks


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 16], help="comma-separated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if native.missing():
        raise MeasuringError(f"there are no kernels to measure: {native.missing()}")
    torch.set_num_threads(given.threads)
    weight = (torch.randn(given.rows, given.columns) * 0.02).bfloat16()
    matrices = [Matrix(codec, weight) for codec in (*AFFINE.values(), LOSSLESS)]
    best = least_of(tasks_of(matrices, weight, given.tokens), given.rounds)

    rows, results = [], []
    for matrix in matrices:
        name = matrix.codec.name
        ratio, rate = matrix.panels.numel() / weight.nbytes, weight.nbytes / best[f"{name} unpack"]
        row = [name, f"{ratio:.3f}", f"{matrix.encode_rate / 1e6:.0f}", f"{rate / 1e9:.1f}"]
        for count in given.tokens:
            fused = f"{best[f'{name} {count}'] * 1e3:.1f}" if f"{name} {count}" in best else "-"
            row.append(f"{fused} ({best[f'{name} blocks {count}'] * 1e3:.1f})")
        rows.append(row)
        results.append({"codec": name, "ratio": ratio, "encode_rate": matrix.encode_rate, "decode_rate": rate})
    plain = [f"{best[f'plain {count}'] * 1e3:.1f}" for count in given.tokens]
    rows.append(["plain", "1", "", "", *plain])
    heads = [f"linear {count}, ms" for count in given.tokens]
    print(table(rows, ["", "bytes", "encode MB/s", "unpack GB/s of bf16", *heads]))
    copy, read = 2 * weight.nbytes / best["copy"], weight.nbytes / best["read"]
    print(f"memory: copy {copy / 1e9:.1f} GB/s there and back, read {read / 1e9:.1f} GB/s; {given.threads} threads")
    line = stamp() | {"rows": given.rows, "columns": given.columns, "threads": given.threads, "codecs": results}
    line |= {"copy_rate": copy, "read_rate": read, "seconds": best}
    record("codecs", line)
    print(json.dumps(line))


if __name__ == "__main__":
    run_main(main)
