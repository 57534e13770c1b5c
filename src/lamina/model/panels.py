"""Where the panels of a weight lie: from boxes of encoded checkpoint tensors to segments of a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from lamina.checkpoint import Checkpoint, Extent, TensorEntry
from lamina.model.disk_tensor import Box, DiskTensor
from lamina.model.encoded import BLOCK, block_rows
from lamina.plan.schedule import Convert, Cut, Piece, Segment, Span, Weight

REPLAY_COPIES = 3  # of a weight while its expression is computed: intermediate results in a wider dtype


def whole_tensor(entry: TensorEntry) -> tuple[Span, ...]:
    """The panels of a checkpoint tensor, in memory that holds all of it."""
    assert entry.encoding is not None
    codec, panel_rows, panel_bytes = entry.encoding.codec, entry.encoding.panel_rows, entry.encoding.panel_bytes
    matrices, rows = _matrices(entry)
    if rows % panel_rows == 0:
        matrices, rows = 1, matrices * rows
    panels = -(-rows // panel_rows)
    return tuple(
        Span(codec, i * panels * panel_bytes, panels, panel_rows, panel_bytes, rows, 0, rows) for i in range(matrices)
    )


def segments_of(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[tuple[Segment, ...], tuple[Piece, ...] | None]:
    """The segments of a weight and the pieces that hold them; no pieces where rows of panels cannot say it."""
    if tensor.boxes is None or tensor.dim() < 2 or not tensor.numel():
        return (), None
    ordered = {box.source for box in tensor.boxes if box.source in checkpoint.row_orders}
    if ordered and (len(tensor.boxes) > 1 or tuple(tensor.shape) != checkpoint.tensors[min(ordered)].shape):
        return (), None
    found: list[tuple[Segment, Extent]] = []
    for box in tensor.boxes:
        runs = list(_runs(box, tuple(tensor.shape), checkpoint.tensors[box.source]))
        if None in runs:
            return (), None
        found.extend(run for run in runs if run is not None)
    found.sort(key=lambda run: run[0].first)
    segments: list[Segment] = []
    pieces: list[Piece] = []
    at = 0
    for segment, extent in found:
        last, piece = (segments[-1], pieces[-1]) if segments else (None, None)
        if piece is not None and _follows(piece.extent, extent):
            grown = Extent(extent.file, piece.extent.offset, piece.extent.length + extent.length)
            pieces[-1] = Piece(grown, piece.at)
        else:
            pieces.append(Piece(extent, at))
        if last is not None and _continues(last, segment):
            segments[-1] = replace(last, rows=last.rows + segment.rows)
        else:
            segments.append(replace(segment, at=at))
        at += extent.length
    covered = sum(segment.rows for segment in segments)
    return (tuple(segments), tuple(pieces)) if covered * tensor.shape[-1] == tensor.numel() else ((), None)


def scratch_bytes(weights: Iterable[Weight]) -> int:
    """Memory that decoding takes: a block of rows for linears, the whole of what is used in another way."""
    block = whole = 0
    for weight in weights:
        if weight.convert is not Convert.DECODE:
            continue
        if weight.cut is Cut.ROWS and weight.segments:
            rows = max(block_rows(weight.shape[-1], weight.itemsize, s.panel_rows) for s in weight.segments)
            block = max(block, BLOCK, min(rows, weight.rows) * weight.shape[-1] * weight.itemsize)
        elif not weight.gathered:
            own = weight.decoded_nbytes // max(weight.experts, 1)
            whole = max(whole, own if weight.segments else own * REPLAY_COPIES)
    return block + whole


def _matrices(entry: TensorEntry) -> tuple[int, int]:
    """How many matrices a tensor is, and the rows of each."""
    count = 1
    for size in entry.shape[:-2]:
        count *= size
    return count, entry.shape[-2]


def _runs(box: Box, shape: tuple[int, ...], entry: TensorEntry) -> Iterator[tuple[Segment, Extent] | None]:
    """For each matrix of a box: the rows of the weight that it is, and the panels that hold them; None if none do."""
    view, columns = box.view, shape[-1]
    if view.dim() < 2 or entry.encoding is None or len(entry.shape) < 2:
        yield None
        return
    sizes, strides = view.shape, view.stride()
    whole_rows = sizes[-1] == columns == entry.shape[-1] and strides[-1] == 1
    if not whole_rows or (sizes[-2] > 1 and strides[-2] != columns):
        yield None
        return
    _, matrix = _matrices(entry)
    panel_rows, panel_bytes = entry.encoding.panel_rows, entry.encoding.panel_bytes
    panels_each = -(-matrix // panel_rows)
    row_strides = _row_strides(shape)
    for index in itertools.product(*(range(size) for size in sizes[:-2])):
        offset = int(view.storage_offset()) + sum(i * s for i, s in zip(index, strides, strict=False))
        number, first = divmod(offset // columns, matrix)
        rows = sizes[-2]
        stop = first + rows
        if offset % columns or first % panel_rows or stop > matrix or (stop % panel_rows and stop != matrix):
            yield None
            return
        place = [i + s for i, s in zip((*index, 0), box.start[:-1], strict=True)]
        target = sum(i * s for i, s in zip(place, row_strides, strict=True))
        begin = (number * panels_each + first // panel_rows) * panel_bytes
        length = -(-rows // panel_rows) * panel_bytes
        segment = Segment(target, rows, entry.encoding.codec, panel_rows, panel_bytes, 0)
        yield segment, Extent(entry.extent.file, entry.extent.offset + begin, length)


def _row_strides(shape: tuple[int, ...]) -> list[int]:
    """Rows of the matrix that one step along each dimension but the last is."""
    strides = [1] * (len(shape) - 1)
    for d in range(len(shape) - 3, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def _follows(one: Extent, other: Extent) -> bool:
    return one.file == other.file and one.offset + one.length == other.offset


def _continues(one: Segment, other: Segment) -> bool:
    same = (one.codec, one.panel_rows, one.panel_bytes) == (other.codec, other.panel_rows, other.panel_bytes)
    return same and one.first + one.rows == other.first and one.rows % one.panel_rows == 0
