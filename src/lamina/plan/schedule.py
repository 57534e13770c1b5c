"""What a pass consumes: the weights, and the calls of modules in the order in which they touch them.

Pure data: names, shapes and byte extents. `lamina.runtime` derives it from a traced forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from lamina.checkpoint.extent import Extent


class Cut(Enum):
    """How a weight may be consumed in blocks along dimension 0."""

    WHOLE = "whole"
    ROWS = "rows"  # every use is a linear: output rows are independent
    EXPERTS = "experts"  # every use picks one expert: `experts` of them lie one after another along dimension 0


class Convert(Enum):
    """What happens between the bytes on disk and the tensor a module sees."""

    NONE = "none"
    CAST = "cast"  # same elements in the same order, another dtype
    REPLAY = "replay"  # the recorded expression is computed on the source tensors
    UNPACK = "unpack"  # it stays in memory as it is on disk, and is unpacked where it is used


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes on disk and where they go: `at` is a byte offset in the weight as stored."""

    extent: Extent
    at: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a weight that one codec holds, in panels that lie one after another.

    Rows are those of the matrix whose columns are the weight's last dimension.

    Attributes:
        first: the first of them.
        rows: how many.
        codec: what the panels are.
        panel_rows: rows of a panel; the last may have fewer.
        panel_bytes: bytes of a panel.
        at: byte of the first panel in the weight as stored.
    """

    first: int
    rows: int
    codec: str
    panel_rows: int
    panel_bytes: int
    at: int

    @property
    def nbytes(self) -> int:
        """Bytes of its panels."""
        return -(-self.rows // self.panel_rows) * self.panel_bytes

    def overlap(self, low: int, high: int, begin: int) -> PanelSpan | None:
        """What of rows `low` to `high` is in here; `begin` is the byte that the caller's memory starts with."""
        first, last = max(self.first, low), min(self.first + self.rows, high)
        if first >= last:
            return None
        panel = (first - self.first) // self.panel_rows
        stop = -(-(last - self.first) // self.panel_rows)
        skip = first - self.first - panel * self.panel_rows
        held = min(stop * self.panel_rows, self.rows) - panel * self.panel_rows
        at = self.at + panel * self.panel_bytes - begin
        return PanelSpan(self.codec, at, stop - panel, self.panel_rows, self.panel_bytes, held, skip, last - first)


@dataclass(frozen=True, slots=True)
class PanelSpan:
    """Panels in memory.

    Attributes:
        codec: what they are.
        at: byte of the first one.
        panels: how many.
        panel_rows, panel_bytes: of a panel.
        held: rows that they hold together.
        skip: of these, rows before the first that is wanted.
        rows: how many are wanted.
    """

    codec: str
    at: int
    panels: int
    panel_rows: int
    panel_bytes: int
    held: int
    skip: int
    rows: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter or buffer of the model, as bytes.

    Attributes:
        name: its first name in the model.
        shape: as the module sees it.
        dtype: as the module sees it, torch's name without the prefix ("bfloat16").
        itemsize: bytes per element as the module sees it.
        pieces: where its bytes are; together they hold `stored_nbytes`.
        stored_itemsize: bytes per element on disk (0 where a replay mixes several).
        stored_nbytes: bytes read for the whole weight.
        convert: what turns the stored bytes into the tensor.
        cut: how it may be consumed in blocks.
        gathered: every use looks rows up; only those rows need to be read.
        always: small or special enough to be resident in every plan.
        experts: how many experts dimension 0 holds, where it is cut by experts.
        segments: the panels of a weight that is unpacked where it is used, in order; none where only the recorded
            expression tells what its bytes are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    pieces: tuple[Piece, ...]
    stored_itemsize: int
    stored_nbytes: int
    convert: Convert = Convert.NONE
    cut: Cut = Cut.WHOLE
    gathered: bool = False
    always: bool = False
    experts: int = 0
    segments: tuple[Segment, ...] = ()

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def unpacked_nbytes(self) -> int:
        """Bytes of all its elements, as the module sees them."""
        return self.elements * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory: a weight that is unpacked where it is used stays as it is stored."""
        return self.stored_nbytes if self.convert is Convert.UNPACK else self.unpacked_nbytes

    @property
    def converted(self) -> bool:
        """Whether its finished tensor has memory of its own, beside the bytes that were read."""
        return self.convert in (Convert.CAST, Convert.REPLAY)

    @property
    def packed(self) -> bool:
        """Whether it stays in memory as it is stored, and is unpacked where it is used."""
        return self.convert is Convert.UNPACK

    @property
    def by_rows(self) -> bool:
        """Whether some of its rows can be read and finished without the others."""
        if self.convert is Convert.UNPACK:
            return len(self.segments) > 1 or any(s.nbytes > s.panel_bytes or s.rows == 1 for s in self.segments)
        return self.convert is not Convert.REPLAY

    @property
    def rows(self) -> int:
        """Length of its first dimension; 1 for a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def inner_rows(self) -> int:
        """Rows of the matrix for each index of dimension 0."""
        return self.elements // max(self.rows * self.shape[-1], 1) if self.shape else 1

    def spans(self, first: int, count: int) -> tuple[PanelSpan, ...]:
        """The panels of `count` indices of dimension 0, in memory that holds their `stored_range`."""
        begin, _ = self.stored_range(first, count)
        low, high = first * self.inner_rows, (first + count) * self.inner_rows
        found = (segment.overlap(low, high, begin) for segment in self.segments)
        return tuple(span for span in found if span is not None)

    def stored_range(self, first: int, count: int) -> tuple[int, int]:
        """The bytes, of those stored, that hold `count` indices of dimension 0 from `first` on."""
        if first == 0 and count == self.rows:
            return 0, self.stored_nbytes
        if not self.segments:
            row = self.stored_nbytes // self.rows
            return first * row, (first + count) * row
        low, high = first * self.inner_rows, (first + count) * self.inner_rows
        spans = [span for segment in self.segments if (span := segment.overlap(low, high, 0)) is not None]
        return spans[0].at, spans[-1].at + spans[-1].panels * spans[-1].panel_bytes

    def pieces_of_rows(self, first: int, count: int) -> tuple[Piece, ...]:
        """The pieces that hold rows `first` to `first + count`, relative to the first of them."""
        if first == 0 and count == self.rows:
            return self.pieces
        begin, end = self.stored_range(first, count)
        if len(self.pieces) == 1:
            extent = self.pieces[0].extent
            return (Piece(Extent(extent.file, extent.offset + begin, end - begin), 0),)
        out = []
        for piece in self.pieces:
            low, high = max(begin, piece.at), min(end, piece.at + piece.extent.length)
            if low < high:
                extent = Extent(piece.extent.file, piece.extent.offset + low - piece.at, high - low)
                out.append(Piece(extent, low - begin))
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module in a pass: the weights its own code touches, and the calls inside, in order."""

    module: str
    touches: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()

    def walk(self) -> Iterator[Call]:
        """This call and every call inside it, outer before inner, in order."""
        yield self
        for call in self.calls:
            yield from call.walk()

    def touched(self) -> dict[str, None]:
        """Every weight touched in this call or inside it, in order of first touch."""
        return {name: None for call in self.walk() for name in call.touches}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pass of a model.

    Attributes:
        root: the call of the whole model.
        weights: every weight by name.
        layers: names of the decoder layer modules; a unit is never larger than one of them.
        routed: by module, how many of its experts a token is sent to, where the trace could tell.
        scratch_bytes: memory that unpacking takes beside the weights.
        traced: False where the order is the order of definition, because the model could not be traced.
        branches: calls that such a pass does not make and others do: towers for images and sound, encoders.
        operations: of torch in a pass; 0 where they were not counted.
    """

    root: Call
    weights: Mapping[str, Weight]
    layers: frozenset[str] = field(default_factory=frozenset)
    traced: bool = True
    routed: Mapping[str, int] = field(default_factory=dict)
    scratch_bytes: int = 0
    operations: int = 0
    branches: tuple[Call, ...] = ()

    def without(self, names: Collection[str]) -> Schedule:
        """The same pass without these weights, which are held elsewhere."""
        if not names:
            return self

        def visit(call: Call) -> Call:
            touches = tuple(name for name in call.touches if name not in names)
            return Call(call.module, touches, tuple(visit(inner) for inner in call.calls))

        weights = {name: weight for name, weight in self.weights.items() if name not in names}
        branches = tuple(visit(branch) for branch in self.branches)
        return replace(self, root=visit(self.root), weights=weights, branches=branches)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(weight.stored_nbytes for weight in self.weights.values())
