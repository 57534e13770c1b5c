"""How much room a store takes, before a byte of it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lamina.checkpoint import Checkpoint, Extent
from lamina.checkpoint.store import PLAIN
from lamina.store.encode import measure_rows
from lamina.store.layout import Stored, StoreFile, file_nbytes
from lamina.store.source import SourceFiles

SAMPLED = 48  # tensors that are looked at where the size of panels depends on the numbers
MARGIN = 1.02  # the largest panel of a tensor may be larger than those that were looked at


def estimate(files: Sequence[StoreFile], checkpoint: Checkpoint) -> int:
    """Bytes of these files: exact, but for lossless panels, which are judged by a sample."""
    unknown = [tensor for file in files for tensor in file.tensors if tensor.codec != PLAIN and not tensor.panel_bytes]
    share = _share(unknown, checkpoint) if unknown else 1.0
    total = 0
    for file in files:
        sized = {each.name: _guess(each, share) for each in file.tensors if each.codec != PLAIN}
        total += file_nbytes(file.replace(sized))
    return total


def _guess(tensor: Stored, share: float) -> Stored:
    if tensor.panel_bytes:
        return tensor
    whole = tensor.panel_rows * tensor.columns * 2
    return tensor.as_plain() if share >= 1 else replace(tensor, panel_bytes=int(share * whole))


def _share(tensors: Sequence[Stored], checkpoint: Checkpoint) -> float:
    """Bytes of panels for each byte of what they hold, as two panels of some tensors have it."""
    files = SourceFiles(checkpoint.fingerprints)
    try:
        read = needed = 0
        for tensor in tensors[:: max(len(tensors) // SAMPLED, 1)]:
            extent = checkpoint.tensors[tensor.name].extent
            for at, nbytes in _two_panels(tensor):
                part = Extent(extent.file, extent.offset + at, nbytes)
                needed += measure_rows(tensor, files.read(part, 0, nbytes))
                read += tensor.panel_rows * tensor.columns * 2
        return MARGIN * needed / read
    finally:
        files.close()


def _two_panels(tensor: Stored) -> Iterator[tuple[int, int]]:
    row = tensor.columns * 2
    rows = min(tensor.panel_rows, tensor.rows)
    yield 0, rows * row
    middle = tensor.rows // 2 // tensor.panel_rows * tensor.panel_rows
    if middle and middle + rows <= tensor.rows:
        yield middle * row, rows * row
