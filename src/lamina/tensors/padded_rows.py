"""Matrix products of even numbers of rows, so that a process does not grow with every new length it meets.

For each number of rows that a bfloat16 or float16 product on the processor has, oneDNN makes and keeps code of its own:
0.56 MB for every new (rows, outputs, inputs), measured with torch 2.13 (docs/log.md). The experts of a long prompt, the
turns of a chat and the passes of a continuous batch have a new number each time, and no budget could hold that. So
from `FROM` rows on products are made of multiples of `MULTIPLE`: rows of zeros are added and their results dropped.
A row's result does not depend on how many others there are, which the parity tests check bit for bit.

A continuous batch meets every number there is, so its products are made of a few sizes only (`BATCHED_SIZES`): as many
of the largest as there are, and smaller ones for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FROM = 17  # rows: below that each number is worth its own code
MULTIPLE = 32
BATCHED_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # one row alone is another kernel, and other bits
FULL = 0.75  # of a size: rather rows of zeros than a second product
CODE_BYTES = 700_000  # of each (rows, outputs, inputs): 0.63 to 0.67 MB measured

_as_they_are: ContextVar[bool] = ContextVar("as_they_are", default=False)
_few_sizes: ContextVar[bool] = ContextVar("few_sizes", default=False)


class _EvenRows(TorchFunctionMode):
    """Gives products even numbers of rows.

    Args:
        batched: of a continuous batch: few sizes.
    """

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.linear = _in_few_sizes if batched else _linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.numel() // max(input.shape[-1], 1)
    if rows < FROM or rows % MULTIPLE == 0 or input.dtype not in (torch.bfloat16, torch.float16):
        return torch.nn.functional.linear(input, weight, bias)
    even = input.new_zeros(-(-rows // MULTIPLE) * MULTIPLE, input.shape[-1])
    even[:rows] = input.reshape(rows, -1)
    out = torch.nn.functional.linear(even, weight, bias)[:rows]
    return out.view(*input.shape[:-1], out.shape[-1])


def _in_few_sizes(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.numel() // max(input.shape[-1], 1)
    if (
        _made_of_parts(weight)
        or rows in BATCHED_SIZES
        or not rows
        or input.dtype not in (torch.bfloat16, torch.float16)
    ):
        return torch.nn.functional.linear(input, weight, bias)
    flat, out, done = input.reshape(rows, -1), None, 0
    for size in pieces(rows):
        piece = flat[done : done + size]
        given = piece.shape[0]
        if given < size:
            piece = torch.cat([piece, piece.new_zeros(size - given, piece.shape[1])])
        result = torch.nn.functional.linear(piece, weight, bias)
        if out is None:
            out = result.new_empty(rows, result.shape[-1])
        out[done : done + given] = result[:given]
        done += given
    assert out is not None
    return out.view(*input.shape[:-1], out.shape[-1])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` with one part of a weight, from within what answers for the whole, where no mode sees it any more."""
    return _in_few_sizes(x, weight, bias) if _few_sizes.get() else torch.nn.functional.linear(x, weight, bias)


def _made_of_parts(weight: torch.Tensor) -> bool:
    """Whether a weight answers `linear` itself, part by part: each part comes once a pass."""
    return type(weight) not in (torch.Tensor, torch.nn.Parameter) and callable(getattr(weight, "linear", None))


def pieces(rows: int) -> list[int]:
    """Sizes of the products that `rows` rows are multiplied in; the last one may have more rows than are left."""
    largest = BATCHED_SIZES[-1]
    found = [largest] * (rows // largest)
    rest = rows % largest
    while rest:
        above = next(size for size in BATCHED_SIZES[1:] if size >= rest)
        if rest > FULL * above or above <= MULTIPLE:
            return [*found, above]
        found.append(above // 2)
        rest -= above // 2
    return found


@contextmanager
def rows_as_they_are() -> Iterator[None]:
    """Within this block `even_rows` does nothing: something else decides how many rows a product has."""
    before = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(before)


@contextmanager
def even_rows(rows: int, device: torch.device, batched: bool = False) -> Iterator[None]:
    """Within this block products of many rows have even numbers of them.

    Args:
        rows: of the pass; where they are few the block costs nothing.
        device: where the model computes.
        batched: the pass is one of a continuous batch.
    """
    if rows < (2 if batched else FROM) or device.type != "cpu" or _as_they_are.get():
        yield
        return
    before = _few_sizes.set(batched)
    try:
        with _EvenRows(batched):
            yield
    finally:
        _few_sizes.reset(before)
