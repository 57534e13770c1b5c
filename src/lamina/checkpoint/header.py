"""A safetensors header, checked once at the door and trusted from then on; and the JSON of strangers that it is.

The checks of a header follow safetensors' own (`Metadata::validate` in safetensors/src/tensor.rs): tensors lie one
behind the other and fill the file to its last byte. In two places this is stricter: a name that occurs twice and a
name that is not valid Unicode are refused.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from typing import Any, NamedTuple, NoReturn, TypeGuard

from lamina.checkpoint.extent import DTYPE_BITS, Extent, TensorEntry
from lamina.errors import (
    ChangedError,
    CheckpointError,
    HeaderError,
    MissingShardError,
    TruncatedError,
    UnsupportedError,
)

PREFIX_BYTES = 8
"""A file begins with the length of its header, a little-endian u64."""

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own cap."""

_MAX_INT = 2**63 - 1

NOT_THE_FILE: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or download the model again",
    ),
    (b"<!DOCTYPE", "is a web page, not the file itself: download it again"),
    (b"<!doctype", "is a web page, not the file itself: download it again"),
    (b"<html", "is a web page, not the file itself: download it again"),
)
"""How files begin that are often in the place of others, and what is said of them."""

NOT_JSON: tuple[tuple[bytes, str], ...] = (
    (b"\xef\xbb\xbf", "begins with a byte order mark, which JSON does not allow: save it as UTF-8 without BOM"),
    (b"\xff\xfe", "is not UTF-8 but UTF-16: save it as UTF-8 without BOM"),
    (b"\xfe\xff", "is not UTF-8 but UTF-16: save it as UTF-8 without BOM"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
)
"""The same of text. What is no text may well begin so."""

_OTHER_WEIGHTS = (
    (b"GGUF", "is a GGUF file under another name: give it the ending .gguf"),
    (
        b"PK\x03\x04",
        "is a zip archive: if torch.save wrote it, give it the ending .bin; if it holds the model's files, unpack it",
    ),
)


class Fingerprint(NamedTuple):
    """What tells that a file is still the one that was opened.

    Attributes:
        size: bytes.
        mtime_ns: time of the last write, in nanoseconds. Copying tools put it back, also over other contents.
        ctime_ns: time of the last change of anything, a new name or owner included; 0 where it is not known.
        place: device and inode; two files have two.
    """

    size: int
    mtime_ns: int
    ctime_ns: int = 0
    place: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        """Of a file that was asked for its status. (What Windows calls ctime never changes.)"""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, (status.st_dev, status.st_ino))

    def touched(self, now: Fingerprint) -> bool:
        """Whether something happened to a file that need not be a write: only its contents can tell."""
        other_time = 0 not in (self.ctime_ns, now.ctime_ns) and self.ctime_ns != now.ctime_ns
        return other_time or (self.place != now.place and (0, 0) not in (self.place, now.place))

    def verify(self, now: Fingerprint, file: str) -> None:
        """Compare size and time of writing with those of `file` now.

        Raises:
            ChangedError: it was written to.
        """
        if now.size != self.size:
            change = f"had {self.size} bytes when it was opened and has {now.size} now"
        elif now.mtime_ns != self.mtime_ns:
            change = "was written to since it was opened"
        else:
            return
        raise ChangedError(f"{file} {change}: load the model again")


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order of its header.

    Reads the header alone, never the weights.

    Args:
        path: the file; the extents hold it as an absolute path.

    Raises:
        MissingShardError: there is no such file.
        TruncatedError: the file ends before its header or its tensors do.
        HeaderError: the header says something that cannot be true.
        CheckpointError: not a regular file, not readable, a Git LFS pointer or a web page.
        UnsupportedError: a GGUF or PyTorch file under a safetensors name.
    """
    return read_header_and_fingerprint(path)[0]


def read_header_and_fingerprint(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], Fingerprint]:
    """`read_header`, and the fingerprint of the very file that was read. Raises what `read_header` raises."""
    file = os.path.abspath(path)
    try:
        # Looked at before it is opened, because opening a pipe would wait for ever.
        mode = os.stat(file).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{file} is a folder where a weights file was expected: fetch the model again")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{file} is not a regular file, so its weights cannot be read in place")
        with open(file, "rb", buffering=0) as handle:
            status = os.fstat(handle.fileno())
            prefix = handle.read(32)
            length = header_length(prefix, status.st_size, file)
            raw = os.pread(handle.fileno(), length, PREFIX_BYTES)
            if len(raw) != length:
                raise TruncatedError(f"{file} became shorter while its header was read: fetch it again")
    except FileNotFoundError:
        raise MissingShardError(missing_file(file)) from None
    except PermissionError:
        raise CheckpointError(f"{file} may not be read by this user: change its permissions") from None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    return parse_header(raw, status.st_size, file), Fingerprint.of(status)


def missing_file(file: str) -> str:
    """The line for a path that leads nowhere, which tells a broken link from nothing at all."""
    if os.path.islink(file):
        return f"{file} is a broken link to {os.readlink(file)}: fetch the model again"
    return f"there is no file {file}: fetch the model again"


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Bytes of the JSON header that follows the first `PREFIX_BYTES` bytes.

    Args:
        prefix: the first bytes of the file: eight are needed, more help to tell what else it could be.
        file_size: bytes of the whole file.
        file: its name in an error.

    Raises:
        TruncatedError: the file is shorter than that.
        HeaderError: the length cannot be one.
        CheckpointError, UnsupportedError: the file begins like something else.
    """
    name = os.path.basename(file)
    refuse_other_content(prefix, name)
    if file_size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        what = "is empty" if file_size == 0 else f"has {file_size} bytes, fewer than any safetensors file"
        raise TruncatedError(f"{name} {what}: the download is incomplete, fetch it again")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{name} claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed: "
            "it is damaged or no safetensors file, fetch it again"
        )
    if PREFIX_BYTES + length > file_size:
        raise TruncatedError(
            f"the header of {name} ends at byte {PREFIX_BYTES + length}, the file at {file_size}: "
            "the download is incomplete, fetch it again"
        )
    return length


def parse_header(raw: bytes, file_size: int, file: str) -> dict[str, TensorEntry]:
    """The tensors that a header describes, in its order.

    Args:
        raw: the JSON header, without the eight bytes before it.
        file_size: bytes of the whole file.
        file: what the extents hold as their file; errors give its last part.

    Raises:
        HeaderError: the header says something that cannot be true.
        TruncatedError: a tensor ends behind the end of the file.
    """
    where = os.path.basename(file)
    header = parse_object(raw, f"the header of {where}", HeaderError)
    _check_metadata(header.pop("__metadata__", None), where)
    data_start = PREFIX_BYTES + len(raw)
    tensors = {name: _entry(name, info, data_start, file, where) for name, info in header.items()}
    _check_layout(tensors, data_start, file_size, where)
    return tensors


def _check_metadata(metadata: object, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"__metadata__ in {where} is not an object of text: the file is damaged, fetch it again")


def _entry(name: str, info: Any, data_start: int, file: str, where: str) -> TensorEntry:
    if not isinstance(info, dict):
        raise _fault(name, where, f"is described by a {type(info).__name__}, not an object")
    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise _fault(name, where, "has a name that is not valid Unicode") from None
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    except KeyError as exc:
        raise _fault(name, where, f"has no {exc.args[0]}") from None
    bits = _element_bits(name, dtype, where)
    begin, end = _span(name, offsets, where)
    length = _tensor_bytes(name, shape, bits, where)
    if length != end - begin:
        raise _fault(name, where, f"takes {length} bytes by dtype and shape, {end - begin} by its offsets")
    return TensorEntry(name, dtype, tuple(shape), Extent(file, data_start + begin, length))


def is_size(value: object) -> TypeGuard[int]:
    """Whether a number of JSON can be one of bytes or elements."""
    return type(value) is int and 0 <= value <= _MAX_INT


def _element_bits(name: str, dtype: object, where: str) -> int:
    if not isinstance(dtype, str):
        raise _fault(name, where, f"has a {type(dtype).__name__} as dtype, not text")
    if (bits := DTYPE_BITS.get(dtype)) is None:
        raise _fault(name, where, f"has the dtype {quote(dtype)}, which safetensors does not know")
    return bits


def _span(name: str, offsets: object, where: str) -> tuple[int, int]:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise _fault(name, where, "has data_offsets that are not two whole numbers from 0 to 2^63-1")
    begin, end = offsets
    if begin > end:
        raise _fault(name, where, f"begins at {begin}, behind its end at {end}")
    return begin, end


def _tensor_bytes(name: str, shape: object, bits: int, where: str) -> int:
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise _fault(name, where, "has a shape that is not a list of whole numbers from 0 to 2^63-1")
    total = bits
    for size in shape:
        total *= size
        if total > 8 * _MAX_INT:
            raise _fault(name, where, "has a shape of more than 2^63 bytes")
    if total % 8:
        raise _fault(name, where, f"has {total} bits, which is no whole number of bytes")
    return total // 8


def _check_layout(tensors: dict[str, TensorEntry], data_start: int, file_size: int, where: str) -> None:
    """Tensors fill the file from the header to its last byte, with neither overlap nor hole."""
    position, previous = data_start, ""
    for entry in sorted(tensors.values(), key=lambda entry: (entry.extent.offset, entry.extent.length)):
        offset = entry.extent.offset
        if offset < position:
            raise _fault(entry.name, where, f"begins at byte {offset}, inside tensor {quote(previous)}")
        if offset > position:
            raise _fault(entry.name, where, f"begins at byte {offset}, after a hole that begins at {position}")
        position, previous = offset + entry.extent.length, entry.name
    if position > file_size:
        raise TruncatedError(
            f"tensor {quote(previous)} in {where} ends at byte {position}, the file at {file_size}: "
            "the download is incomplete, fetch it again"
        )
    if position < file_size:
        raise HeaderError(
            f"the tensors in {where} end at byte {position}, the file at {file_size}: "
            "the file is damaged or was written to, fetch it again"
        )


def _fault(name: str, where: str, what: str) -> HeaderError:
    return HeaderError(f"tensor {quote(name)} in {where} {what}: the file is damaged, fetch it again")


def quote(name: str) -> str:
    """A name from a file, quoted on one line and cut where it is absurdly long."""
    return repr(name if len(name) <= 200 else f"{name[:200]}...")


def refuse_other_content(start: bytes, what: str) -> None:
    """Raises what fits when a file begins like something that people often have in its place."""
    for magic, message in NOT_THE_FILE:
        if start.startswith(magic):
            raise CheckpointError(f"{what} {message}")
    for magic, message in _OTHER_WEIGHTS:
        if start.startswith(magic):
            raise UnsupportedError(f"{what} {message}")


def parse_object(raw: bytes, what: str, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in `raw`.

    Args:
        raw: UTF-8 text.
        what: how an error names it, such as `"the header of model.safetensors"`.
        error: the class to raise.

    Raises:
        CheckpointError: of class `error`; not UTF-8, not JSON, not an object, a key twice, too deep.
    """

    def reject_constant(constant: str) -> NoReturn:
        raise error(f"{what} holds {constant}, which JSON does not allow: the file is damaged, fetch it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise error(f"{what} names {quote(twice)} twice: the file is damaged, fetch it again")
        return found

    for magic, message in (*NOT_THE_FILE, *NOT_JSON):
        if raw.startswith(magic):
            raise error(f"{what} {message}")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_int=_number, parse_constant=reject_constant)
    except UnicodeDecodeError as exc:
        raise error(f"{what} is not UTF-8 (byte {exc.start}): the file is damaged, fetch it again") from None
    except RecursionError:
        raise error(f"{what} is nested too deeply: this is not a checkpoint, fetch it again") from None
    except ValueError as exc:
        raise error(f"{what} is not JSON ({exc}): the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise error(f"{what} is a JSON {type(value).__name__}, not an object: the file is damaged, fetch it again")
    return value


def _number(text: str) -> float:
    # Minus zero is no whole number to safetensors either.
    return -0.0 if text == "-0" else int(text)
