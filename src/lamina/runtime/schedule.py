"""From a built model and its trace to the planner's schedule: every weight as extents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lamina.checkpoint import Checkpoint, Extent
from lamina.hf.recorder import layer_names, weight_names
from lamina.hf.trace import Trace
from lamina.plan.layout import PACKING, align
from lamina.plan.schedule import Call, Convert, Cut, PanelSpan, Piece, Schedule, Segment, Weight
from lamina.runtime.panels import is_plain, scratch_bytes, segments_of, whole_tensor
from lamina.tensors.disk import DiskTensor, torch_dtype
from lamina.tensors.expressions import Box, Expression, replay, sources_of
from lamina.tensors.packed import Encoded, Scratch

SHORTEST_RUN = 4096  # bytes; a weight in shorter runs is replayed instead of addressed
MOST_RUNS = 1 << 16
PACKED_FROM = 1.25  # times smaller on disk: from there on a replayed weight stays in memory as it is stored
SMALL_SHARE = 0.0005  # of the model: the smallest weights that together stay below it are always resident


@dataclass(frozen=True)
class Replay:
    """How to compute a weight from its stored sources.

    Attributes:
        expression: recorded by transformers' loader.
        sources: name, byte offset, shape and dtype of each source in the stored area.
        encoded: the panels of the sources that are stored in panels.
        orders: the order of rows of the sources whose file has another one.
    """

    expression: Expression
    sources: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    encoded: Mapping[str, tuple[PanelSpan, ...]] = field(default_factory=dict)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """Compute the weight.

        Args:
            stored: uint8 of shape (stored_nbytes,).
        """
        loaded = {}
        for name, at, shape, dtype in self.sources:
            if name in self.encoded:
                order = self.orders.get(name)
                loaded[name] = Encoded(shape, dtype, stored[at:], self.encoded[name], Scratch(), order=order).decode()
                continue
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            loaded[name] = stored[at : at + nbytes].view(dtype).view(shape)
            if name in self.orders:
                loaded[name] = loaded[name][self.orders[name]]
        return replay(self.expression, loaded.__getitem__)


@dataclass(frozen=True)
class Weights:
    """The schedule, and what pure data cannot hold: the replays, by weight name, and the stored dtypes.

    `routers` are the modules that say where tokens go, by the experts module that they say it to; `orders` the
    order of a weight's rows among those stored.
    """

    schedule: Schedule
    replays: Mapping[str, Replay]
    stored_dtypes: Mapping[str, torch.dtype]
    routers: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)


def describe(model: torch.nn.Module, checkpoint: Checkpoint, traced: Trace) -> Weights:
    """Everything that the planner and the stream need to know about a model's weights."""
    buffers = {name for name, _ in model.named_buffers()}
    weights: dict[str, Weight] = {}
    replays: dict[str, Replay] = {}
    stored: dict[str, torch.dtype] = {}
    orders: dict[str, torch.Tensor] = {}
    for name, tensor in weight_names(model).items():
        if not isinstance(tensor, DiskTensor):
            continue
        uses, experts = traced.uses.get(name, frozenset()), traced.experts.get(name, 0)
        weight, own = _weight(name, tensor, checkpoint, uses, experts, name in buffers)
        if own is not None:
            replays[name] = own
        elif tensor.boxes:
            stored[name] = tensor.boxes[0].view.dtype
            source = tensor.boxes[0].source
            if isinstance(source, str) and source in checkpoint.row_orders:
                orders[name] = torch.tensor(checkpoint.row_orders[source])
        weights[name] = weight
    for name in _small(weights):
        weights[name] = _with(weights[name], always=True)
    root = _without_lookups(traced.root, traced.lookups, weights)
    schedule = Schedule(root, weights, layer_names(model), traced.traced, dict(traced.routed),
                        scratch_bytes(weights.values()), traced.operations)  # fmt: skip
    return Weights(schedule, replays, stored, traced.routers, orders)


def _weight(
    name: str, tensor: DiskTensor, checkpoint: Checkpoint, uses: frozenset[str], experts: int, is_buffer: bool
) -> tuple[Weight, Replay | None]:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    plain = tensor.boxes is not None and all(is_plain(box.source, checkpoint) for box in tensor.boxes)
    pieces = _pieces(tensor, checkpoint) if plain else None
    segments: tuple[Segment, ...] = ()
    if pieces is None:
        segments, pieces = segments_of(tensor, checkpoint)
    if pieces is None:
        own, stored_pieces, stored_nbytes = _replayed(tensor, checkpoint)
        shrinks = stored_nbytes * PACKED_FROM <= tensor.numel() * tensor.element_size() and len(shape) >= 2
        convert = Convert.DECODE if shrinks and not is_buffer else Convert.REPLAY
        weight = Weight(name, shape, dtype, tensor.element_size(), stored_pieces, 0, stored_nbytes, convert)
        return _with(weight, always=is_buffer), own
    stored_itemsize = 1 if segments else (tensor.cast_from or tensor.dtype).itemsize
    convert = Convert.NONE if tensor.cast_from is None else Convert.CAST
    convert = Convert.DECODE if segments else convert
    looked_up = "embedding" in uses
    cut = Cut.WHOLE
    if uses - {"embedding"} == {"linear"} and len(shape) == 2:
        cut = Cut.ROWS
    elif uses == {"experts"} and len(shape) >= 2 and experts and shape[0] % experts == 0:
        cut = Cut.EXPERTS
    gathered = looked_up and uses == {"embedding"} and len(shape) == 2
    nbytes = sum(piece.extent.length for piece in pieces)
    if segments:
        nbytes = segments[-1].at + segments[-1].nbytes
    weight = Weight(name, shape, dtype, tensor.element_size(), pieces, stored_itemsize, nbytes, convert, cut, gathered,
                    experts=experts if cut is Cut.EXPERTS else 0, segments=segments)  # fmt: skip
    return _with(weight, always=is_buffer or not tensor.numel()), None


def _with(weight: Weight, *, always: bool) -> Weight:
    if weight.always or not always:
        return weight
    fields = {f: getattr(weight, f) for f in Weight.__dataclass_fields__}
    return Weight(**{**fields, "always": True, "gathered": False})


def _small(weights: Mapping[str, Weight]) -> list[str]:
    """One-dimensional weights, and the smallest others that together are a negligible share."""
    total = sum(weight.nbytes for weight in weights.values())
    names = [w.name for w in weights.values() if len(w.shape) < 2]
    left = SMALL_SHARE * total
    for weight in sorted(weights.values(), key=lambda w: w.nbytes):
        if len(weight.shape) < 2:
            continue
        left -= weight.nbytes
        if left < 0:
            break
        names.append(weight.name)
    return names


def _without_lookups(call: Call, lookups: frozenset[tuple[str, str]], weights: Mapping[str, Weight]) -> Call:
    """The calls without the touches that only look rows up, which are served row by row.

    A tied table is looked up in one module and multiplied in another: there it streams.
    """

    def streams(module: str, name: str) -> bool:
        weight = weights.get(name)
        if weight is None:
            return False
        return not (len(weight.shape) == 2 and weight.by_rows and (module, name) in lookups)

    def visit(node: Call) -> Call:
        return Call(
            node.module,
            tuple(name for name in node.touches if streams(node.module, name)),
            tuple(visit(inner) for inner in node.calls),
        )

    return visit(call)


def _pieces(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[Piece, ...] | None:
    """Runs of bytes that hold the tensor in row-major order, or None where they would be too many."""
    assert tensor.boxes is not None
    itemsize = (tensor.cast_from or tensor.dtype).itemsize
    pieces: list[Piece] = []
    for box in tensor.boxes:
        runs = _runs(box, tuple(tensor.shape), itemsize)
        if runs is None or len(pieces) + len(runs) > MOST_RUNS:
            return None
        assert isinstance(box.source, str)
        extent = checkpoint.tensors[box.source].extent
        pieces.extend(Piece(Extent(extent.file, extent.offset + begin, length), at) for begin, at, length in runs)
    pieces.sort(key=lambda piece: piece.at)
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.extent.file == piece.extent.file
            and last.at + last.extent.length == piece.at
            and last.extent.offset + last.extent.length == piece.extent.offset
        ):
            extent = Extent(last.extent.file, last.extent.offset, last.extent.length + piece.extent.length)
            merged[-1] = Piece(extent, last.at)
        else:
            merged.append(piece)
    covered = sum(piece.extent.length for piece in merged)
    return tuple(merged) if covered == tensor.numel() * itemsize else None


def _runs(box: Box, shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int, int]] | None:
    """(byte in the source, byte in the tensor, bytes) of each run that is contiguous in both."""
    sizes, strides = box.view.shape, box.view.stride()
    if box.view.numel() == 0:
        return []
    run, depth = 1, box.view.dim()
    while depth and (sizes[depth - 1] == 1 or strides[depth - 1] == run):
        depth -= 1
        run *= sizes[depth]
        if sizes[depth] != shape[depth]:
            break
    if depth and run * itemsize < SHORTEST_RUN:
        return None
    weight_strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        weight_strides[d] = weight_strides[d + 1] * shape[d + 1]
    origin = sum(s * w for s, w in zip(box.start, weight_strides, strict=True))
    runs = []
    for index in itertools.product(*(range(size) for size in sizes[:depth])):
        begin = int(box.view.storage_offset()) + sum(i * s for i, s in zip(index, strides, strict=False))
        at = origin + sum(i * w for i, w in zip(index, weight_strides, strict=False))
        runs.append((begin * itemsize, at * itemsize, run * itemsize))
        if len(runs) > MOST_RUNS:
            return None
    return runs


def _replayed(tensor: DiskTensor, checkpoint: Checkpoint) -> tuple[Replay, tuple[Piece, ...], int]:
    pieces, sources, at = [], [], 0
    encoded, orders = {}, {}
    for name in sources_of(tensor.expression):
        entry = checkpoint.tensors[name]
        if entry.encoding is not None:
            encoded[name] = whole_tensor(entry)
        if name in checkpoint.row_orders:
            orders[name] = torch.tensor(checkpoint.row_orders[name])
        pieces.append(Piece(entry.extent, at))
        sources.append((name, at, entry.shape, torch_dtype(entry)))
        at = align(at + entry.extent.length, PACKING)
    return Replay(tensor.expression, tuple(sources), encoded, orders), tuple(pieces), at
