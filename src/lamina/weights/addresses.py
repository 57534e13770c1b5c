"""Where the bytes of a weight are: from boxes of checkpoint tensors to pieces of files.

A weight is made of boxes, strided regions of checkpoint tensors. Where a tensor's bytes are its elements, a box is runs
of elements that are contiguous both on disk and in the weight. Where a codec stores it, a box is whole panels of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lamina.checkpoint import Checkpoint, Extent, TensorEntry
from lamina.codec.quantized import codec_of
from lamina.codec.quantized_layouts import Packed
from lamina.plan.layout import PACKING, align
from lamina.plan.schedule import PanelSpan, Piece, Segment
from lamina.tensors.disk import DiskTensor, torch_dtype
from lamina.tensors.expressions import Box, Computed

SHORTEST_RUN = 4096  # bytes; a weight in shorter runs is replayed instead of addressed
MOST_RUNS = 1 << 16

ExtentParts = list[tuple[Extent, int]]
"""Extents, each with the byte where it goes."""


@dataclass(frozen=True)
class Panels:
    """The panels of a checkpoint tensor, or of what stands for one.

    Attributes:
        codec: name of it.
        shape: of the tensor.
        panel_rows, panel_bytes: of a panel.
        extents: what the panels are made of. Of one extent each panel has its own bytes, one after another; of
            several, each holds an equal share of every matrix, and a matrix is a panel.
        at: byte in the panel of each extent.
    """

    codec: str
    shape: tuple[int, ...]
    panel_rows: int
    panel_bytes: int
    extents: tuple[Extent, ...]
    at: tuple[int, ...] = (0,)

    @property
    def matrices(self) -> int:
        """How many matrices the tensor is made of: the product of all dimensions but the last two."""
        return math.prod(self.shape[:-2])

    def places(self, first: int, count: int) -> ExtentParts:
        """Where `count` panels from `first` on are read from, and to."""
        if len(self.extents) == 1:
            whole = self.extents[0]
            return [(Extent(whole.file, whole.offset + first * self.panel_bytes, count * self.panel_bytes), 0)]
        found = []
        for panel in range(first, first + count):
            for extent, at in zip(self.extents, self.at, strict=True):
                share = extent.length // self.matrices
                own = Extent(extent.file, extent.offset + panel * share, share)
                found.append((own, (panel - first) * self.panel_bytes + at))
        return found


@dataclass(frozen=True)
class Addresses:
    """Where the bytes of a weight are.

    Attributes:
        pieces: of files, in the order of the weight's own bytes.
        segments: the panels that they hold, in order; none where the bytes are the weight's elements.
    """

    pieces: tuple[Piece, ...]
    segments: tuple[Segment, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is stored."""
        if self.segments:
            return self.segments[-1].at + self.segments[-1].nbytes
        return sum(piece.extent.length for piece in self.pieces)


def addresses_of(tensor: DiskTensor, checkpoint: Checkpoint) -> Addresses | None:
    """Where the bytes of a weight are; None where only its recorded expression tells how it comes from them."""
    if tensor.boxes is None:
        return None
    if all(_is_plain(box.source, checkpoint) for box in tensor.boxes):
        pieces = pieces_of(tensor, checkpoint)
        return None if pieces is None else Addresses(pieces)
    return _of_panels(tensor, tensor.boxes, checkpoint)


def pieces_of(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[Piece, ...] | None:
    """Runs of bytes that hold the tensor in row-major order, or None where they would be too many."""
    assert tensor.boxes is not None
    itemsize = (tensor.cast_from or tensor.dtype).itemsize
    runs: list[tuple[int, Extent]] = []
    for box in tensor.boxes:
        found = _runs(box, tuple(tensor.shape), itemsize)
        if found is None or len(runs) + len(found) > MOST_RUNS:
            return None
        assert isinstance(box.source, str)
        whole = checkpoint.tensors[box.source].extent
        runs.extend((at, Extent(whole.file, whole.offset + begin, length)) for begin, at, length in found)
    pieces: list[Piece] = []
    for at, extent in sorted(runs, key=lambda run: run[0]):
        _add(pieces, extent, at)
    return tuple(pieces) if Addresses(tuple(pieces)).nbytes == tensor.numel() * itemsize else None


def _of_panels(tensor: DiskTensor, boxes: Sequence[Box], checkpoint: Checkpoint) -> Addresses | None:
    """The segments of a weight and the pieces that hold them; None where rows of panels cannot say it."""
    if tensor.dim() < 2 or not tensor.numel() or not _orders_fit(tensor, boxes, checkpoint):
        return None
    found: list[tuple[Segment, ExtentParts]] = []
    for box in boxes:
        panels = panels_of(box.source, checkpoint)
        own = _panel_runs(box, tuple(tensor.shape), panels) if panels is not None else None
        if own is None:
            return None
        found.extend(own)
    if sum(segment.rows for segment, _ in found) * tensor.shape[-1] != tensor.numel():
        return None
    return _in_a_row(sorted(found, key=lambda run: run[0].first))


def _in_a_row(found: Iterable[tuple[Segment, ExtentParts]]) -> Addresses:
    """Segments one after another, neighbours of one kind joined, and the pieces that hold them."""
    segments: list[Segment] = []
    pieces: list[Piece] = []
    at = 0
    for segment, places in found:
        at = at if len(places) == 1 else align(at, PACKING)
        if segments and len(places) == 1 and _continues(segments[-1], segment, at):
            segments[-1] = replace(segments[-1], rows=segments[-1].rows + segment.rows)
        else:
            segments.append(replace(segment, at=at))
        for extent, offset in places:
            _add(pieces, extent, at + offset)
        at += segment.nbytes
    return Addresses(tuple(pieces), tuple(segments))


# Runs: what of a box is contiguous both where it is stored and in the weight.


def _runs(box: Box, shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int, int]] | None:
    """(byte in the source, byte in the tensor, bytes) of each run of elements; None where they are short, or many."""
    if box.view.numel() == 0:
        return []
    sizes, strides = box.view.shape, box.view.stride()
    run, depth = 1, box.view.dim()
    while depth and (sizes[depth - 1] == 1 or strides[depth - 1] == run):
        depth -= 1
        run *= sizes[depth]
        if sizes[depth] != shape[depth]:
            break
    if (depth and run * itemsize < SHORTEST_RUN) or math.prod(sizes[:depth]) > MOST_RUNS:
        return None
    return [(begin * itemsize, at * itemsize, run * itemsize) for begin, at in _starts(box, shape, depth)]


def _panel_runs(box: Box, shape: tuple[int, ...], panels: Panels) -> list[tuple[Segment, ExtentParts]] | None:
    """For each matrix of a box: the rows of the weight that it is, and where its panels are; None if none are it."""
    sizes, strides, columns = box.view.shape, box.view.stride(), shape[-1]
    whole_rows = len(sizes) >= 2 and sizes[-1] == columns == panels.shape[-1] and strides[-1] == 1
    if not whole_rows or (sizes[-2] > 1 and strides[-2] != columns):
        return None
    rows, matrix, panel_rows = sizes[-2], panels.shape[-2], panels.panel_rows
    runs = []
    for begin, at in _starts(box, shape, len(sizes) - 2):
        number, first = divmod(begin // columns, matrix)
        stop = first + rows
        if begin % columns or first % panel_rows or stop > matrix or (stop % panel_rows and stop != matrix):
            return None
        panel = number * -(-matrix // panel_rows) + first // panel_rows
        segment = Segment(at // columns, rows, panels.codec, panel_rows, panels.panel_bytes, 0)
        runs.append((segment, panels.places(panel, -(-rows // panel_rows))))
    return runs


def _starts(box: Box, shape: tuple[int, ...], depth: int) -> Iterator[tuple[int, int]]:
    """(element of the source, element of the tensor) that each part begins with; a part has no first `depth` dims."""
    own, theirs = box.view.stride(), [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin, at = int(box.view.storage_offset()), _element(box.start, theirs)
    for index in itertools.product(*(range(size) for size in box.view.shape[:depth])):
        yield begin + _element(index, own), at + _element(index, theirs)


def _element(index: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie before the one with this index; an index may leave the last dimensions out."""
    return sum(i * stride for i, stride in zip(index, strides, strict=False))


def _add(pieces: list[Piece], extent: Extent, at: int) -> None:
    """One more piece, joined to the last one where both are adjacent, on disk and in memory."""
    last = pieces[-1] if pieces else None
    if last is not None and _follows(last.extent, extent) and last.at + last.extent.length == at:
        pieces[-1] = Piece(Extent(extent.file, last.extent.offset, last.extent.length + extent.length), last.at)
    else:
        pieces.append(Piece(extent, at))


def _follows(one: Extent, other: Extent) -> bool:
    return one.file == other.file and one.offset + one.length == other.offset


# Panels: what a codec stores as one.


def _is_plain(source: str | Computed, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint tensor's bytes are its elements, in order."""
    if isinstance(source, Computed):
        return False
    return checkpoint.tensors[source].encoding is None and source not in checkpoint.row_orders


def panels_of(source: str | Computed, checkpoint: Checkpoint) -> Panels | None:
    """The panels of a source; None where it has none."""
    if isinstance(source, Computed):
        return _panels_computed(source, [checkpoint.tensors[name] for name in source.names])
    entry = checkpoint.tensors[source]
    if entry.encoding is None or len(entry.shape) < 2:
        return None
    encoding = entry.encoding
    return Panels(encoding.codec, entry.shape, encoding.panel_rows, encoding.panel_bytes, (entry.extent,))


def _panels_computed(source: Computed, stored: Sequence[TensorEntry]) -> Panels | None:
    """The panels of what several tensors of a quantised checkpoint make together."""
    if not isinstance(source.func, Packed) or any(entry.encoding is not None for entry in stored):
        return None
    codec = codec_of(source.func, [(entry.shape, torch_dtype(entry)) for entry in stored])
    if codec is None:
        return None
    extents, at = tuple(entry.extent for entry in stored), tuple(field.at for field in codec.fields)
    return Panels(codec.name, source.shape, source.shape[-2], codec.panel_bytes, extents, at)


def whole_tensor(entry: TensorEntry) -> tuple[PanelSpan, ...]:
    """The panels of a checkpoint tensor, in memory that holds all of it."""
    assert entry.encoding is not None
    codec, panel_rows, panel_bytes = entry.encoding.codec, entry.encoding.panel_rows, entry.encoding.panel_bytes
    matrices, rows = math.prod(entry.shape[:-2]), entry.shape[-2]
    if rows % panel_rows == 0:
        matrices, rows = 1, matrices * rows
    panels = -(-rows // panel_rows)
    return tuple(
        PanelSpan(codec, i * panels * panel_bytes, panels, panel_rows, panel_bytes, rows, 0, rows)
        for i in range(matrices)
    )


def _orders_fit(tensor: DiskTensor, boxes: Sequence[Box], checkpoint: Checkpoint) -> bool:
    """Whether rows in another order are those of the whole weight, if any are."""
    ordered = [s for box in boxes if isinstance(s := box.source, str) and s in checkpoint.row_orders]
    whole = len(boxes) == 1 and not boxes[0].view.storage_offset()
    return not ordered or (whole and tuple(tensor.shape) == checkpoint.tensors[ordered[0]].shape)


def _continues(one: Segment, other: Segment, at: int) -> bool:
    same = (one.codec, one.panel_rows, one.panel_bytes) == (other.codec, other.panel_rows, other.panel_bytes)
    follows = one.first + one.rows == other.first and one.at + one.nbytes == at
    return same and follows and one.rows % one.panel_rows == 0
