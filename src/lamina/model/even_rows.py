"""Matrix products of even numbers of rows, so that a process does not grow with every new length it meets.

For each number of rows that a bfloat16 or float16 product on the processor has, oneDNN makes and keeps code of its own:
0.56 MB for every new (rows, outputs, inputs), measured with torch 2.13 (docs/log.md). The experts of a long prompt, the
turns of a chat and the passes of a continuous batch have a new number each time, and no budget could hold that. So
from `FROM` rows on products are made of multiples of `MULTIPLE`: rows of zeros are added and their results dropped.
A row's result does not depend on how many others there are, which the parity tests check bit for bit.
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

_as_they_are: ContextVar[bool] = ContextVar("as_they_are", default=False)


class _EvenRows(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.numel() // max(input.shape[-1], 1)
    if rows < FROM or rows % MULTIPLE == 0 or input.dtype not in (torch.bfloat16, torch.float16):
        return torch.nn.functional.linear(input, weight, bias)
    even = input.new_zeros(-(-rows // MULTIPLE) * MULTIPLE, input.shape[-1])
    even[:rows] = input.reshape(rows, -1)
    out = torch.nn.functional.linear(even, weight, bias)[:rows]
    return out.view(*input.shape[:-1], out.shape[-1])


@contextmanager
def rows_as_they_are() -> Iterator[None]:
    """Within this block `even_rows` does nothing: something else decides how many rows a product has."""
    before = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(before)


@contextmanager
def even_rows(rows: int, device: torch.device) -> Iterator[None]:
    """Within this block products of many rows have even numbers of them.

    Args:
        rows: of the pass; where they are few the block costs nothing.
        device: where the model computes.
    """
    if rows < FROM or device.type != "cpu" or _as_they_are.get():
        yield
        return
    with _EvenRows():
        yield
