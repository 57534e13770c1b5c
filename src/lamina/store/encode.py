"""From rows in the source to bytes in the store, a block of rows at a time.

A tensor may be larger than memory: no more of it than `BLOCK_ELEMENTS` numbers is ever held, and what codecs make of
them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lamina.checkpoint import TensorEntry
from lamina.codec import AFFINE, LOSSLESS
from lamina.errors import CheckpointError
from lamina.store.shards import Stored
from lamina.store.source import SourceFiles
from lamina.tensors.disk import torch_dtype

BLOCK_ELEMENTS = 1 << 20
COPIED_BYTES = 8 << 20  # of plain bytes at a time


def plain_chunks(entry: TensorEntry, files: SourceFiles) -> Iterator[memoryview]:
    """The bytes of a tensor as they are."""
    for at in range(0, entry.extent.length, COPIED_BYTES):
        yield files.read(entry.extent, at, min(COPIED_BYTES, entry.extent.length - at))


def row_blocks(tensor: Stored, entry: TensorEntry, files: SourceFiles) -> Iterator[torch.Tensor]:
    """The rows of a tensor in blocks of whole panels, each of shape (rows, columns); the next overwrites the last."""
    dtype = torch_dtype(entry)
    row_bytes = tensor.columns * dtype.itemsize
    step = max(BLOCK_ELEMENTS // tensor.columns // tensor.panel_rows, 1) * tensor.panel_rows
    for matrix in range(tensor.matrices):
        for first in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - first)
            raw = files.read(entry.extent, (matrix * tensor.rows + first) * row_bytes, rows * row_bytes)
            yield torch.frombuffer(raw, dtype=dtype).view(rows, tensor.columns)


def encoded_chunks(tensor: Stored, entry: TensorEntry, files: SourceFiles) -> Iterator[tuple[int, Any]]:
    """The panels of a tensor in order: bytes read from the source, and the bytes to write for them.

    Raises:
        CheckpointError: its numbers cannot be encoded.
    """
    for block in row_blocks(tensor, entry, files):
        try:
            if tensor.codec == LOSSLESS.name:
                panels = LOSSLESS.encode(block, tensor.panel_rows, tensor.panel_bytes)
            else:
                panels = AFFINE[tensor.codec].encode(block)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {entry.name!r} in {entry.extent.file}: {error}") from None
        yield block.nbytes, panels.contiguous().view(-1).numpy()


def measure(tensor: Stored, entry: TensorEntry, files: SourceFiles, seen: Callable[[int], None]) -> int:
    """Bytes that the neediest panel of a lossless tensor takes.

    Args:
        seen: called with the number of bytes that were read.
    """
    most = 0
    for block in row_blocks(tensor, entry, files):
        most = max(most, LOSSLESS.need(block, tensor.panel_rows))
        seen(block.nbytes)
    return most


def measure_rows(tensor: Stored, raw: memoryview) -> int:
    """Bytes that the panel of these rows takes."""
    block = torch.frombuffer(raw, dtype=torch.bfloat16).view(-1, tensor.columns)
    return LOSSLESS.need(block, tensor.panel_rows)
