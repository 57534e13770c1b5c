"""Where the panels of a weight lie: from boxes of encoded checkpoint tensors to segments of a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lamina.checkpoint import Checkpoint, Extent, TensorEntry
from lamina.codec.quantized import codec_of
from lamina.codec.quantized_layouts import Packed
from lamina.plan.layout import PACKING, align
from lamina.plan.schedule import Convert, Cut, PanelSpan, Piece, Segment, Weight
from lamina.tensors.disk import DiskTensor, torch_dtype
from lamina.tensors.expressions import Box, Computed
from lamina.tensors.packed import BLOCK, block_rows

REPLAY_COPIES = 3  # of a weight while its expression is computed: intermediate results in a wider dtype


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
        count = 1
        for size in self.shape[:-2]:
            count *= size
        return count

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


def is_plain(source: str | Computed, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint tensor's bytes are its elements, in order."""
    if isinstance(source, Computed):
        return False
    return checkpoint.tensors[source].encoding is None and source not in checkpoint.row_orders


def panels_of(source: str | Computed, checkpoint: Checkpoint) -> Panels | None:
    """The panels of a source; None where it has none."""
    if isinstance(source, Computed):
        if not isinstance(source.func, Packed):
            return None
        stored = [checkpoint.tensors[name] for name in source.names]
        if any(entry.encoding is not None for entry in stored):
            return None
        codec = codec_of(source.func, [(entry.shape, torch_dtype(entry)) for entry in stored])
        if codec is None:
            return None
        extents, at = tuple(entry.extent for entry in stored), tuple(field.at for field in codec.fields)
        return Panels(codec.name, source.shape, source.shape[-2], codec.panel_bytes, extents, at)
    entry = checkpoint.tensors[source]
    if entry.encoding is None or len(entry.shape) < 2:
        return None
    encoding = entry.encoding
    return Panels(encoding.codec, entry.shape, encoding.panel_rows, encoding.panel_bytes, (entry.extent,))


def whole_tensor(entry: TensorEntry) -> tuple[PanelSpan, ...]:
    """The panels of a checkpoint tensor, in memory that holds all of it."""
    assert entry.encoding is not None
    codec, panel_rows, panel_bytes = entry.encoding.codec, entry.encoding.panel_rows, entry.encoding.panel_bytes
    matrices, rows = _matrices(entry)
    if rows % panel_rows == 0:
        matrices, rows = 1, matrices * rows
    panels = -(-rows // panel_rows)
    return tuple(
        PanelSpan(codec, i * panels * panel_bytes, panels, panel_rows, panel_bytes, rows, 0, rows)
        for i in range(matrices)
    )


def segments_of(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[tuple[Segment, ...], tuple[Piece, ...] | None]:
    """The segments of a weight and the pieces that hold them; no pieces where rows of panels cannot say it."""
    if tensor.boxes is None or tensor.dim() < 2 or not tensor.numel() or not _orders_fit(tensor, checkpoint):
        return (), None
    found: list[tuple[Segment, ExtentParts]] = []
    for box in tensor.boxes:
        panels = panels_of(box.source, checkpoint)
        runs = list(_runs(box, tuple(tensor.shape), panels)) if panels is not None else [None]
        if None in runs:
            return (), None
        found.extend(run for run in runs if run is not None)
    found.sort(key=lambda run: run[0].first)
    segments: list[Segment] = []
    pieces: list[Piece] = []
    at = 0
    for segment, places in found:
        last = segments[-1] if segments else None
        at = at if len(places) == 1 else align(at, PACKING)
        if last is not None and len(places) == 1 and _continues(last, segment, at):
            segments[-1] = replace(last, rows=last.rows + segment.rows)
        else:
            segments.append(replace(segment, at=at))
        for extent, offset in places:
            _add(pieces, extent, at + offset)
        at += segment.nbytes
    covered = sum(segment.rows for segment in segments)
    return (tuple(segments), tuple(pieces)) if covered * tensor.shape[-1] == tensor.numel() else ((), None)


def _orders_fit(tensor: DiskTensor, checkpoint: Checkpoint) -> bool:
    """Whether rows in another order are those of the whole weight, if any are."""
    assert tensor.boxes is not None
    ordered = [s for box in tensor.boxes if isinstance(s := box.source, str) and s in checkpoint.row_orders]
    whole = len(tensor.boxes) == 1 and not tensor.boxes[0].view.storage_offset()
    return not ordered or (whole and tuple(tensor.shape) == checkpoint.tensors[ordered[0]].shape)


def _add(pieces: list[Piece], extent: Extent, at: int) -> None:
    last = pieces[-1] if pieces else None
    if last is not None and _follows(last.extent, extent) and last.at + last.extent.length == at:
        pieces[-1] = Piece(Extent(extent.file, last.extent.offset, last.extent.length + extent.length), last.at)
    else:
        pieces.append(Piece(extent, at))


def scratch_bytes(weights: Iterable[Weight]) -> int:
    """Memory that decoding takes: a block of rows for linears, the whole of what is used in another way."""
    block = whole = 0
    for weight in weights:
        if weight.convert is not Convert.DECODE:
            continue
        if weight.cut is Cut.ROWS and weight.segments:
            rows = max(block_rows(weight.shape[-1], weight.itemsize, s.codec, s.panel_rows) for s in weight.segments)
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


def _runs(box: Box, shape: tuple[int, ...], panels: Panels) -> Iterator[tuple[Segment, ExtentParts] | None]:
    """For each matrix of a box: the rows of the weight that it is, and where its panels are; None if none are it."""
    view, columns = box.view, shape[-1]
    sizes, strides = view.shape, view.stride()
    whole_rows = view.dim() >= 2 and sizes[-1] == columns == panels.shape[-1] and strides[-1] == 1
    if not whole_rows or (sizes[-2] > 1 and strides[-2] != columns):
        yield None
        return
    matrix, panel_rows = panels.shape[-2], panels.panel_rows
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
        panel = number * -(-matrix // panel_rows) + first // panel_rows
        segment = Segment(target, rows, panels.codec, panel_rows, panels.panel_bytes, 0)
        yield segment, panels.places(panel, -(-rows // panel_rows))


def _row_strides(shape: tuple[int, ...]) -> list[int]:
    """Rows of the matrix that one step along each dimension but the last is."""
    strides = [1] * (len(shape) - 1)
    for d in range(len(shape) - 3, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def _follows(one: Extent, other: Extent) -> bool:
    return one.file == other.file and one.offset + one.length == other.offset


def _continues(one: Segment, other: Segment, at: int) -> bool:
    same = (one.codec, one.panel_rows, one.panel_bytes) == (other.codec, other.panel_rows, other.panel_bytes)
    follows = one.first + one.rows == other.first and one.at + one.nbytes == at
    return same and follows and one.rows % one.panel_rows == 0
