"""How much room a store takes, and about how long writing it does, before a byte of it is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lamina.checkpoint import Checkpoint, Extent
from lamina.checkpoint.manifest import PLAIN
from lamina.codec import AFFINE, LOSSLESS
from lamina.store.encode import measure_rows
from lamina.store.shards import Stored, StoreFile, file_nbytes
from lamina.store.source import SourceFiles

SAMPLED = 48  # tensors that are looked at where the size of panels depends on the numbers
SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE_ROUNDS = 256, 2048, 3  # of a block that is encoded to see how long it takes
FILE_BYTES_PER_SECOND = 1e9  # read, or written with its checksum: SHA-256 alone does as much
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


def seconds_of(files: Sequence[StoreFile]) -> float:
    """About how long writing takes: encoding as quick as a made-up block is here, and files as they usually are."""
    sources: dict[str, int] = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        sources[tensor.codec] = sources.get(tensor.codec, 0) + tensor.source_nbytes
    written = sum(file_nbytes(file) for file in files)
    encoding = sum(nbytes / _encoding_rate(codec) for codec, nbytes in sources.items() if codec != PLAIN)
    return encoding + (sum(sources.values()) + written) / FILE_BYTES_PER_SECOND


def _encoding_rate(codec: str) -> float:
    """Bytes of bf16 that become panels in a second, on this machine."""
    block = torch.randn(SAMPLE_ROWS, SAMPLE_COLUMNS).bfloat16()
    took = []
    for _ in range(SAMPLE_ROUNDS + 1):
        began = time.perf_counter()
        if codec == LOSSLESS.name:
            LOSSLESS.encode(block, SAMPLE_ROWS, LOSSLESS.need(block, SAMPLE_ROWS))
        else:
            AFFINE[codec].encode(block)
        took.append(time.perf_counter() - began)
    return block.nbytes / max(statistics.median(took[1:]), 1e-9)  # the first one may compile the kernel


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
