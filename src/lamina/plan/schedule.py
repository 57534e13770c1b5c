"""What a pass consumes: the weights, and the calls of modules in the order in which they touch them.

Pure data: names, shapes and byte extents. `lamina.model` derives it from a traced forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes on disk and where they go: `at` is a byte offset in the weight as stored."""

    extent: Extent
    at: int


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

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes in memory once it is a tensor."""
        return self.elements * self.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def pieces_of_rows(self, first: int, count: int) -> tuple[Piece, ...]:
        """The pieces that hold rows `first` to `first + count`, relative to the first of them."""
        if first == 0 and count == self.rows:
            return self.pieces
        row = self.stored_nbytes // self.rows
        begin, end = first * row, (first + count) * row
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
        traced: False where the order is the order of definition, because the model could not be traced.
    """

    root: Call
    weights: Mapping[str, Weight]
    layers: frozenset[str] = field(default_factory=frozenset)
    traced: bool = True
    routed: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(weight.stored_nbytes for weight in self.weights.values())
