"""Which tensor lies where in which file: pure arithmetic, from the recipe to headers.

A file holds one unit of the model, a decoder layer as a rule. Within it the tensors that one weight of the model is
made of lie one behind the other, so that they are one read, and each such run begins at a multiple of 4096 bytes, so
that it can be read past the page cache to where it is computed on. What is too small to matter comes last.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lamina.checkpoint import DTYPE_BITS
from lamina.checkpoint.manifest import METADATA_KEY, PADDING, PLAIN, count_panels, describe_tensor

ALIGNMENT = 4096
SMALL_BYTES = 1 << 16  # a run of fewer bytes need not be aligned: it is read once, when the model is loaded
WIDEST_ELEMENT = 8  # bytes: where a small run begins in a file with padding
OWN_FILE_BYTES = 32 << 20  # what belongs to no layer gets a file of its own from this size on
MOST_BYTES = 2 << 30  # of a file, where a layer is larger: less is lost when a split is stopped


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it will be stored.

    Attributes:
        name: as in the source.
        dtype, shape: of the source, in safetensors' terms.
        codec: `plain`, or a name that `lamina.codec` knows.
        panel_rows: rows of a panel; 0 where plain.
        panel_bytes: bytes of a panel; 0 where plain.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str = PLAIN
    panel_rows: int = 0
    panel_bytes: int = 0

    @property
    def columns(self) -> int:
        """Length of the last dimension; 1 for a single number."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Of one matrix."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def matrices(self) -> int:
        """How many there are: the product of all dimensions but the last two."""
        return math.prod(self.shape[:-2])

    @property
    def source_nbytes(self) -> int:
        """Bytes in the source."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def panels(self) -> int:
        """How many panels hold all matrices."""
        return count_panels(self.shape, self.panel_rows)

    @property
    def nbytes(self) -> int:
        """Bytes in the store."""
        return self.source_nbytes if self.codec == PLAIN else self.panels * self.panel_bytes

    def as_plain(self) -> Stored:
        """The same tensor, stored as it is in the source."""
        return Stored(self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that lie one behind the other.

    Attributes:
        unit: name of the layer that they belong to; empty for the rest of the model.
        tensors: in the order in which the model's weight holds them.
    """

    unit: str
    tensors: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the store."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class StoreFile:
    """One file of a store.

    Attributes:
        name: of the file.
        runs: in the order of their bytes.
        padded: put padding between runs; without it only the order aligns them.
    """

    name: str
    runs: tuple[Run, ...]
    padded: bool

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """Of all runs, in the order of their bytes."""
        return tuple(tensor for run in self.runs for tensor in run.tensors)

    @property
    def source_nbytes(self) -> int:
        """Bytes of its tensors in the source."""
        return sum(tensor.source_nbytes for tensor in self.tensors)

    def replace(self, tensors: dict[str, Stored]) -> StoreFile:
        """The same file with some tensors stored in another way."""
        runs = (
            dataclasses.replace(run, tensors=tuple(tensors.get(each.name, each) for each in run.tensors))
            for run in self.runs
        )
        return dataclasses.replace(self, runs=_ordered(runs))


def make_files(runs: Sequence[Run], *, padded: bool) -> list[StoreFile]:
    """The files of a store, in the order in which a pass needs them.

    Args:
        runs: in that order too.
        padded: see `StoreFile`.
    """
    units: dict[str, list[list[Run]]] = {}
    for number, run in enumerate(runs):
        own = not run.unit and run.nbytes >= OWN_FILE_BYTES
        parts = units.setdefault(f"{number}" if own else f"unit {run.unit}", [[]])
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + run.nbytes > MOST_BYTES:
            parts.append([])
        parts[-1].append(run)
    small = units.pop("unit ", [])  # what belongs to no layer and is small comes last
    files = [part for parts in [*units.values(), small] for part in parts]
    return [
        StoreFile(f"model-{number:05d}-of-{len(files):05d}.safetensors", _ordered(part), padded)
        for number, part in enumerate(files, start=1)
    ]


def _ordered(runs: Iterable[Run]) -> tuple[Run, ...]:
    """What ends at a multiple of the alignment first, so that the next needs no padding; then wide elements first,
    because torch sees no tensor that begins between two of its elements; small ones last."""

    def rank(run: Run) -> tuple[bool, int, bool]:
        width = min((DTYPE_BITS[each.dtype] if each.codec == PLAIN else 8 for each in run.tensors), default=8)
        return run.nbytes % ALIGNMENT > 0, -width, run.nbytes < SMALL_BYTES

    return tuple(sorted(runs, key=rank))


def header_of(file: StoreFile) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the data, and where each tensor lies.

    Returns:
        Length prefix and header, padded with spaces to a multiple of `ALIGNMENT`; byte offset from the start of the
        data and length by name, padding tensors included, in the order of their bytes.
    """
    header: dict[str, object] = {}
    coded = {each.name: describe_tensor(each) for each in file.tensors if each.codec != PLAIN}
    header["__metadata__"] = {"format": "pt", **({METADATA_KEY: _dump(coded)} if coded else {})}
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for run in file.runs:
        fill = -at % (ALIGNMENT if run.nbytes >= SMALL_BYTES else WIDEST_ELEMENT) if file.padded else 0
        if fill:
            name = f"{PADDING}{file.name}.{len(places)}"
            header[name] = {"dtype": "U8", "shape": [fill], "data_offsets": [at, at + fill]}
            places[name] = (at, fill)
            at += fill
        for tensor in run.tensors:
            plain = tensor.codec == PLAIN
            header[tensor.name] = {
                "dtype": tensor.dtype if plain else "U8",
                "shape": list(tensor.shape) if plain else [tensor.panels, tensor.panel_bytes],
                "data_offsets": [at, at + tensor.nbytes],
            }
            places[tensor.name] = (at, tensor.nbytes)
            at += tensor.nbytes
    raw = _dump(header).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw, places


def file_nbytes(file: StoreFile) -> int:
    """Bytes of the whole file."""
    prefix, places = header_of(file)
    return len(prefix) + max((at + length for at, length in places.values()), default=0)


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
