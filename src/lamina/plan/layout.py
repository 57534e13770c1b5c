"""What is moved as one: a pass cut into units, and where the bytes of a unit lie in memory.

Direct reads want the file offset, the memory address and the length aligned to `ALIGNMENT`. A weight
that is one run of bytes on disk is placed at an address congruent to its file offset: the read is rounded
outwards to the alignment and the tensor is a view into it. A weight made of several runs is packed behind an
address congruent to its first run's offset: where the others are congruent as well, as in most files, only the
edges of the runs have to go through a small bounce buffer. Pure arithmetic, shared by the planner and the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lamina.plan.schedule import Call, Cut, Piece, Schedule, Weight

ROW_MULTIPLE = 256  # rows of a block: the same kernels then give the same bits as the whole linear
ALIGNMENT = 4096  # of direct reads, and of every area
PACKING = 64  # of tensors that are not read in place: what torch gives its own allocations
GAP = 64 * 1024  # a hole up to this size between two runs of a file is read rather than skipped


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `first` to `first + count` of a weight."""

    weight: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Read:
    """`length` bytes at `offset` of `file` go to byte `at` of the area; `aligned` fits direct reads.

    An aligned read may end past the last byte that is wanted, even past the end of the file: only the
    first `needed` bytes must arrive.
    """

    file: str
    offset: int
    length: int
    at: int
    needed: int
    aligned: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A part in its area: stored bytes at `stored_at`, the finished tensor at `at`."""

    part: Part
    stored_at: int
    stored_nbytes: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """An area of `nbytes`: what is read into it and what lies where."""

    nbytes: int
    reads: tuple[Read, ...]
    placed: tuple[Placed, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that are read into it."""
        return sum(read.needed for read in self.reads)


def align(value: int, to: int = ALIGNMENT) -> int:
    """`value` rounded up to a multiple of `to`."""
    return -(-value // to) * to


def lay_out(parts: Sequence[tuple[Weight, Part]], gap: int | None = None) -> Layout:
    """Place parts of weights in one area.

    Args:
        parts: the weights and the rows of each that are wanted.
        gap: the longest hole in a file that is read rather than skipped; `GAP` where not said.

    Returns:
        The layout; `placed` is in the order of `parts`.
    """
    pieces = [weight.pieces_of_rows(part.first, part.count) for weight, part in parts]
    stored = [_stored(weight, part, own) for (weight, part), own in zip(parts, pieces, strict=True)]
    reads, stored_at, end = _spans(_in_place(parts, pieces), GAP if gap is None else gap)
    for i, own in enumerate(pieces):
        if i not in stored_at:
            stored_at[i] = end = _packed_at(end, parts[i][0], own)
            reads.extend(read_at(piece, end) for piece in own)
            end += stored[i]
    placed = []
    for i, (weight, part) in enumerate(parts):
        at, nbytes = stored_at[i], stored[i] if weight.packed else _unpacked(weight, part)
        if weight.converted:
            at = align(end, PACKING)
            end = at + nbytes
        placed.append(Placed(part, stored_at[i], stored[i], at, nbytes))
    return Layout(align(end), tuple(reads), tuple(placed))


def read_at(piece: Piece, area: int) -> Read:
    """An unaligned read of a piece, to its place in what begins at byte `area`."""
    extent = piece.extent
    return Read(extent.file, extent.offset, extent.length, area + piece.at, extent.length, False)


def _in_place(parts: Sequence[tuple[Weight, Part]], pieces: Sequence[Sequence[Piece]]) -> list[tuple[int, Piece]]:
    """The parts that are used where a direct read leaves them, by their place among all, in the order of the disk."""
    found = [(i, own[0]) for i, own in enumerate(pieces) if len(own) == 1 and _viewable(parts[i][0], own[0])]
    return sorted(found, key=lambda run: (run[1].extent.file, run[1].extent.offset))


def _packed_at(end: int, weight: Weight, pieces: Sequence[Piece]) -> int:
    """Where a weight of several runs begins, at or after `end`."""
    if not pieces or not _viewable(weight, pieces[0]):
        return align(end, PACKING)
    return align(end) + (pieces[0].extent.offset - pieces[0].at) % ALIGNMENT


def _stored(weight: Weight, part: Part, pieces: Sequence[Piece]) -> int:
    if weight.segments:
        begin, end = weight.stored_range(part.first, part.count)
        return end - begin
    return max((piece.at + piece.extent.length for piece in pieces), default=0)


def _unpacked(weight: Weight, part: Part) -> int:
    """Bytes of a part as the module sees it."""
    return weight.unpacked_nbytes // max(weight.rows, 1) * part.count


def _viewable(weight: Weight, piece: Piece) -> bool:
    """Whether the bytes may be used where a direct read leaves them.

    A fp32 matrix-vector product begins at an aligned address and so rounds by its alignment: a weight of one
    run keeps its file's, as under mmap, but a merged one has torch's own, whichever part of it is read.
    """
    if not weight.stored_itemsize or piece.extent.offset % weight.stored_itemsize:
        return False
    return len(weight.pieces) == 1 or weight.stored_itemsize < 4 or piece.extent.offset % PACKING == 0


def _spans(runs: Sequence[tuple[int, Piece]], gap: int) -> tuple[list[Read], dict[int, int], int]:
    """Aligned reads over sorted runs, neighbours joined; where each run's first byte lands; the area's end."""
    reads: list[Read] = []
    stored_at: dict[int, int] = {}
    end = 0
    for i, piece in runs:
        file, begin, stop = piece.extent.file, piece.extent.offset, piece.extent.offset + piece.extent.length
        last = reads[-1] if reads else None
        if last is not None and last.file == file and begin <= last.offset + last.length + gap:
            length = max(last.length, align(stop) - last.offset)
            needed = max(last.needed, stop - last.offset)
            reads[-1] = last = Read(file, last.offset, length, last.at, needed, True)
        else:
            offset = begin - begin % ALIGNMENT
            last = Read(file, offset, align(stop) - offset, align(end), stop - offset, True)
            reads.append(last)
        stored_at[i] = last.at + begin - last.offset
        end = last.at + last.length
    return reads, stored_at, end


@dataclass(frozen=True)
class Item:
    """What is moved as one, for one step of a pass: parts of the weights of one module call.

    `cached` items are kept in host memory and only cross to the device.
    """

    module: str
    block: int
    parts: tuple[Part, ...]
    layout: Layout
    cached: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its area."""
        return self.layout.nbytes


def cut_up(schedule: Schedule, streaming: Mapping[str, Weight], size: int) -> tuple[tuple[Item, ...], tuple[int, ...]]:
    """Units of at most about `size` bytes, and the order in which a pass needs them.

    A call whose streamed weights fit in `size` becomes one unit, bound when its module is entered and
    released when it is left; a larger one is divided among the calls inside it; one linear that is
    larger than `size` becomes blocks of rows.
    """
    items: list[Item] = []
    index: dict[tuple[str, tuple[str, ...]], range] = {}
    steps: list[int] = []

    def emit(module: str, names: Sequence[str]) -> None:
        key = (module, tuple(names))
        if key not in index:
            blocks = _blocks([streaming[name] for name in names], size)
            index[key] = range(len(items), len(items) + len(blocks))
            items.extend(
                Item(module, block, tuple(p for _, p in parts), lay_out(parts)) for block, parts in enumerate(blocks)
            )
        steps.extend(index[key])

    divisible = _ancestors(schedule.root, schedule.layers | _shared(schedule.root))

    def visit(call: Call) -> None:
        inside = [name for name in call.touched() if name in streaming]
        total = sum(streaming[name].nbytes for name in inside)
        if call.module not in divisible and total <= size:
            if inside:
                emit(call.module, inside)
            return
        own = [name for name in dict.fromkeys(call.touches) if name in streaming]
        if own:
            emit(call.module, own)
        for inner in call.calls:
            visit(inner)

    visit(schedule.root)
    return tuple(items), tuple(steps)


def _shared(root: Call) -> frozenset[str]:
    """Modules with weights that have several callers: each is bound by its own hook."""
    callers: dict[str, set[str]] = {}
    for call in root.walk():
        for inner in call.calls:
            callers.setdefault(inner.module, set()).add(call.module)
    several = {module for module, by in callers.items() if len(by) > 1}
    return frozenset(call.module for call in root.walk() if call.module in several and call.touched())


def _ancestors(root: Call, layers: frozenset[str]) -> frozenset[str]:
    """Modules that contain one of `layers`: binding one that contains a decoder layer would bind the model."""
    found: set[str] = set()

    def visit(call: Call) -> bool:
        inside = [visit(inner) for inner in call.calls]
        if any(inside):
            found.add(call.module)
        return any(inside) or call.module in layers

    visit(root)
    return frozenset(found)


def _blocks(weights: Sequence[Weight], size: int) -> list[list[tuple[Weight, Part]]]:
    """The weights of one unit as one block; one linear that is too large as several."""
    weight = weights[0]
    total = sum(w.nbytes for w in weights)
    if total <= size or len(weights) > 1 or not weight.by_rows or weight.cut is not Cut.ROWS:
        return [[(w, Part(w.name, 0, w.rows)) for w in weights]]
    rows = max(size // max(weight.nbytes // weight.rows, 1) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    count = math.ceil(weight.rows / rows)
    rows = align(math.ceil(weight.rows / count), ROW_MULTIPLE)  # even blocks read better
    return [[(weight, Part(weight.name, at, min(rows, weight.rows - at)))] for at in range(0, weight.rows, rows)]


def widest_window(root: Call, items: Sequence[Item], steps: Sequence[int]) -> int:
    """Most bytes between the oldest unit still held and the newest one asked for, over a pass."""
    ends = [0]
    for step in steps:
        ends.append(ends[-1] + items[step].nbytes)
    widest = 0
    at = 0
    modules = {item.module for item in items}

    def visit(call: Call, held: int | None) -> None:
        nonlocal widest, at
        if call.module in modules and at < len(steps) and items[steps[at]].module == call.module:
            first = at
            while at < len(steps) and items[steps[at]].module == call.module and items[steps[at]].block == at - first:
                start = held if held is not None else ends[at]
                widest = max(widest, ends[at + 1] - start)
                at += 1
            if at - first == 1:
                held = held if held is not None else ends[first]
        for inner in call.calls:
            visit(inner, held)

    visit(root, None)
    return widest
