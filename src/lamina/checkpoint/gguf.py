"""A GGUF header, checked once at the door and trusted from then on.

Knows where the tensors lie and which blocks they are made of, and the metadata as the file has it. Does not
know what a key means to a model, nor how a block is unpacked: an `Encoding` names the codec that does.

The checks follow gguf.cpp's own (`gguf_init_from_file` in ggml/src/gguf.cpp), which the `gguf` package leaves
out: tensors lie one behind the other, each padded to the file's alignment. Arrays, such as a vocabulary of
150,000 words, are walked over and not kept.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from lamina.checkpoint.checkpoint import Checkpoint, merge_tensors
from lamina.checkpoint.choose import part_names
from lamina.checkpoint.extent import DTYPE_BYTES, Encoding, Extent, TensorEntry
from lamina.checkpoint.header import Fingerprint, missing_file, quote, refuse_other_content
from lamina.errors import CheckpointError, HeaderError, MissingShardError, TruncatedError, UnsupportedError

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 512 << 20
"""More than any vocabulary needs; ten times the largest that was seen."""

CODEC_PREFIX = "gguf."
PLAIN_TYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
"""Name, elements and bytes of a block, by the number that a header has for it (`enum ggml_type` in ggml.h)."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_KEY = (1 << 16) - 1
_MAX_INT = 2**63 - 1
_FIRST_READ = 1 << 20

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class MetadataField:
    """One key of the metadata.

    Attributes:
        kind: its type's number in the header.
        value: of anything but an array; of an array, how many elements it has.
        offset, length: where key, type and value lie in the file.
    """

    kind: int
    value: Value
    offset: int
    length: int

    @property
    def is_array(self) -> bool:
        """Whether the value is an array, of which only the length is known."""
        return self.kind == _ARRAY


@dataclass(frozen=True)
class GgufFile:
    """A model in GGUF: one file, or all the parts of a split one.

    Attributes:
        checkpoint: its tensors by their GGUF names, in torch's order of dimensions.
        fields: the metadata of the first part, which has all that concerns the whole.
    """

    checkpoint: Checkpoint
    fields: Mapping[str, MetadataField]

    @property
    def path(self) -> str:
        """The file, or the first part of several."""
        return self.checkpoint.files[0]

    def get(self, key: str) -> Value | None:
        """The value of a key; None where there is none, or a whole array."""
        field = self.fields.get(key)
        return None if field is None or field.is_array else field.value


@dataclass(frozen=True)
class _Part:
    fields: dict[str, MetadataField]
    tensors: dict[str, TensorEntry]
    fingerprint: Fingerprint


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """The model in a GGUF file, every header of it checked. Any part of a split one stands for all.

    Raises:
        MissingShardError: there is no such file, or a part is missing.
        TruncatedError: the file ends before its header or its tensors do.
        HeaderError: the header says something that cannot be true.
        CheckpointError: not a regular file, not readable, a Git LFS pointer or a web page, parts of two models.
        UnsupportedError: another version or byte order, or a type of blocks without a codec here.
    """
    first = os.path.abspath(os.path.expanduser(os.fspath(path)))
    files = _parts(first)
    parts = {file: _read(file) for file in files}
    count = parts[files[0]].fields.get("split.count")
    if (claimed := count.value if count else 0) not in ((0, 1) if len(files) == 1 else (len(files),)):
        raise MissingShardError(
            f"{os.path.basename(first)} says that it is one of {claimed} files, its name says {len(files)}: "
            "give the parts the names they were published with"
        )
    tensors = merge_tensors(part.tensors for part in parts.values())
    if not tensors:
        raise CheckpointError(f"{first} holds no tensors: it is a vocabulary alone, give the file of a model")
    fingerprints = {file: part.fingerprint for file, part in parts.items()}
    checkpoint = Checkpoint(os.path.dirname(first), tuple(files), tensors, fingerprints)
    return GgufFile(checkpoint, parts[files[0]].fields)


def gguf_extents(path: str) -> list[Extent]:
    """Where the tensors of one GGUF file lie, parts of split ones by themselves. Raises what `open_gguf` raises."""
    return [entry.extent for entry in _read(path).tensors.values()]


def _parts(first: str) -> list[str]:
    folder, name = os.path.split(first)
    files = [os.path.join(folder, each) for each in part_names(name)]
    if len(files) > 1 and (missing := [each for each in files if not os.path.exists(each)]):
        others = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else ""
        raise MissingShardError(f"{name} needs {os.path.basename(missing[0])}{others}: {missing_file(missing[0])}")
    return files


def _read(file: str) -> _Part:
    try:
        # Looked at before it is opened, because opening a pipe would wait for ever.
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise CheckpointError(f"{file} is {what} where a GGUF file was expected: give the file of a model")
        with open(file, "rb", buffering=0) as handle:
            status = os.fstat(handle.fileno())
            cursor = _Cursor(handle.fileno(), status.st_size, os.path.basename(file))
            return _Part(*_parse(cursor, file), Fingerprint.of(status))
    except FileNotFoundError:
        raise MissingShardError(missing_file(file)) from None
    except PermissionError:
        raise CheckpointError(f"{file} may not be read by this user: change its permissions") from None
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc.strerror or exc}") from exc


class _Cursor:
    """Reads a header from its start to its end, and no further than it must."""

    def __init__(self, descriptor: int, file_size: int, where: str) -> None:
        self.where, self.file_size, self.at = where, file_size, 0
        self._descriptor, self._buffer = descriptor, bytearray()

    def skip(self, nbytes: int) -> int:
        """Go on by that many bytes; gives where they begin."""
        begin, end = self.at, self.at + nbytes
        if end > len(self._buffer):
            self._fetch(end)
        self.at = end
        return begin

    def take(self, nbytes: int) -> bytes:
        begin = self.skip(nbytes)
        return bytes(self._buffer[begin : self.at])

    def number(self, form: str) -> int | float:
        begin = self.skip(struct.calcsize(form))
        value: int | float = struct.unpack_from(form, self._buffer, begin)[0]
        return value

    def whole(self, form: str = "<Q") -> int:
        return int(self.number(form))

    def text(self, what: str, longest: int = _MAX_INT) -> str:
        length = self.whole()
        if length > longest:
            raise self.fault(f"{what} of {length} bytes, at most {longest} are allowed")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.fault(f"{what} that is not UTF-8 (byte {exc.start})") from None

    def fault(self, what: str) -> HeaderError:
        return HeaderError(f"the header of {self.where} has {what}: the file is damaged, fetch it again")

    def _fetch(self, end: int) -> None:
        if end > self.file_size:
            raise TruncatedError(
                f"the header of {self.where} continues to byte {end}, the file ends at {self.file_size}: "
                "the download is incomplete, fetch it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fault(f"more than {MAX_HEADER_BYTES} bytes")
        wanted = min(max(end, 2 * len(self._buffer), _FIRST_READ), self.file_size, MAX_HEADER_BYTES)
        while len(self._buffer) < end:
            more = os.pread(self._descriptor, wanted - len(self._buffer), len(self._buffer))
            if not more:
                raise TruncatedError(f"{self.where} became shorter while its header was read: fetch it again")
            self._buffer += more


def _parse(cursor: _Cursor, file: str) -> tuple[dict[str, MetadataField], dict[str, TensorEntry]]:
    tensor_count, field_count = _counts(cursor)
    fields: dict[str, MetadataField] = {}
    for _ in range(field_count):
        begin = cursor.at
        key = cursor.text("a key", _LONGEST_KEY)
        if key in fields:
            raise cursor.fault(f"the key {quote(key)} twice")
        kind = cursor.whole("<I")
        value = _value(cursor, kind, key)
        fields[key] = MetadataField(kind, value, begin, cursor.at - begin)
    alignment = _alignment(cursor, fields)
    found = [_described(cursor) for _ in range(tensor_count)]
    data_start = _align(cursor.at, alignment)
    tensors: dict[str, TensorEntry] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise cursor.fault(f"the tensor {quote(name)} twice")
        tensors[name] = _entry(cursor.where, name, shape, kind, Extent(file, data_start + offset, 0))
    _check_layout(tensors, data_start, alignment, cursor)
    return fields, tensors


def _counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.file_size < 24:
        what = "is empty" if not cursor.file_size else f"has {cursor.file_size} bytes, fewer than any GGUF file"
        raise TruncatedError(f"{cursor.where} {what}: the download is incomplete, fetch it again")
    magic = cursor.take(4)
    if magic != MAGIC:
        cursor.at = 0
        refuse_other_content(cursor.take(24), cursor.where)
        raise HeaderError(
            f"{cursor.where} does not begin like a GGUF file: it is damaged or another kind, fetch it again"
        )
    version = cursor.whole("<I")
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.where} is a big-endian GGUF file: use the little-endian one")
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"{cursor.where} is GGUF of version {version}, versions 2 and 3 can be read: "
            + ("convert it again with a current llama.cpp" if version < 2 else "upgrade lamina")
        )
    return cursor.whole(), cursor.whole()


def _value(cursor: _Cursor, kind: int, key: str) -> Value:
    if kind == _STRING:
        return cursor.text(f"text under {quote(key)}")
    if kind == _ARRAY:
        return _walk(cursor, key)
    if kind not in _SCALARS:
        raise cursor.fault(f"a value of the unknown type {kind} under {quote(key)}")
    value = cursor.number(_SCALARS[kind])
    if kind == _BOOL and value not in (0, 1):
        raise cursor.fault(f"{value} as the truth value of {quote(key)}")
    return bool(value) if kind == _BOOL else value


def _walk(cursor: _Cursor, key: str) -> int:
    """Passes over an array; gives its number of elements."""
    kind, count = cursor.whole("<I"), cursor.whole()
    if kind in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[kind]))
    elif kind == _STRING:
        for _ in range(count):
            cursor.skip(cursor.whole())
    else:
        raise cursor.fault(f"an array of the unknown type {kind} under {quote(key)}")
    return count


def _alignment(cursor: _Cursor, fields: Mapping[str, MetadataField]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return 32
    value = field.value
    if field.is_array or not isinstance(value, int) or value < 1 or value & (value - 1) or value > MAX_HEADER_BYTES:
        raise cursor.fault(f"the alignment {value}, which is no power of two")
    return value


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name", _LONGEST_KEY)
    dimensions = cursor.whole("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.fault(f"{dimensions} dimensions for tensor {quote(name)}, at most {_MOST_DIMENSIONS} are allowed")
    sizes = [cursor.whole() for _ in range(dimensions)]
    kind, offset = cursor.whole("<I"), cursor.whole()
    if offset > _MAX_INT or any(size > _MAX_INT for size in sizes):
        raise cursor.fault(f"a size or offset beyond 2^63 for tensor {quote(name)}")
    return name, tuple(reversed(sizes)), kind, offset  # GGUF counts the fastest dimension first


def _entry(where: str, name: str, shape: tuple[int, ...], kind: int, at: Extent) -> TensorEntry:
    elements = 1
    for size in shape:
        elements *= size
    if elements > _MAX_INT // 8:
        raise HeaderError(
            f"tensor {quote(name)} in {where} has more than 2^60 elements: the file is damaged, fetch it again"
        )
    if (plain := PLAIN_TYPES.get(kind)) is not None:
        return TensorEntry(name, plain, shape, Extent(at.file, at.offset, elements * DTYPE_BYTES[plain]))
    if kind not in BLOCK_TYPES:
        raise UnsupportedError(
            f"tensor {quote(name)} in {where} is of GGUF type {kind}, which cannot be unpacked here: "
            "use a file of another quantisation, such as Q4_K_M or Q8_0"
        )
    codec, block, nbytes = BLOCK_TYPES[kind]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise HeaderError(
            f"tensor {quote(name)} in {where} has rows of {columns} elements, {codec} has blocks of {block}: "
            "the file is damaged, fetch it again"
        )
    length = elements // block * nbytes
    encoding = Encoding(CODEC_PREFIX + codec, 1, columns // block * nbytes)
    return TensorEntry(name, "F32", shape, Extent(at.file, at.offset, length), encoding)


def _check_layout(tensors: Mapping[str, TensorEntry], data_start: int, alignment: int, cursor: _Cursor) -> None:
    """Tensors lie one behind the other, padded to the alignment, and end within the file."""
    position, end, previous = data_start, data_start, ""
    for entry in sorted(tensors.values(), key=lambda entry: (entry.extent.offset, entry.extent.length)):
        offset = entry.extent.offset
        if offset != position:
            what = f"inside tensor {quote(previous)}" if offset < end else f"where {position} was expected"
            raise HeaderError(
                f"tensor {quote(entry.name)} in {cursor.where} begins at byte {offset}, {what}: "
                "the file is damaged, fetch it again"
            )
        end = offset + entry.extent.length
        position, previous = _align(end, alignment), entry.name
    if end > cursor.file_size:
        raise TruncatedError(
            f"tensor {quote(previous)} in {cursor.where} ends at byte {end}, the file at {cursor.file_size}: "
            "the download is incomplete, fetch it again"
        )


def _align(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment
