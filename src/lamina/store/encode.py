"""From rows in the source to bytes in the store, a block of rows at a time.

A tensor may be larger than memory: no more of it than `BLOCK_ELEMENTS` numbers is ever held, and what codecs make of
them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch

from lamina.checkpoint import TensorEntry
from lamina.codec import Codec, codec_for
from lamina.model.build import torch_dtype
from lamina.store.layout import Stored
from lamina.store.source import SourceFiles

BLOCK_ELEMENTS = 1 << 20
COPIED_BYTES = 8 << 20  # of plain bytes at a time


class Encoder(Codec, Protocol):
    """A codec whose panels have a size that the number of columns alone tells."""

    def panel_bytes(self, columns: int) -> int:
        """Bytes of a panel."""
        ...

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        """Panels of the rows of `block`: uint8 of shape (panels, panel_bytes)."""
        ...


def encoder_for(name: str) -> Encoder:
    """The codec of that name, which can encode as well."""
    return cast(Encoder, codec_for(name))


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
    """The panels of a tensor in order: bytes read from the source, and the bytes to write for them."""
    encoder = encoder_for(tensor.codec)
    for block in row_blocks(tensor, entry, files):
        panels = encoder.encode(block).contiguous()
        yield block.nbytes, panels.view(-1).numpy()


def measure(tensor: Stored, entry: TensorEntry, files: SourceFiles, seen: Callable[[int], None]) -> int:
    """Bytes that the largest panel of a lossless tensor needs.

    Args:
        seen: called with the number of bytes that were read.
    """
    raise NotImplementedError


def measure_rows(tensor: Stored, raw: memoryview) -> int:
    """Bytes that the panel of these rows needs."""
    raise NotImplementedError
