"""The manifest of a store that `lamina split` wrote: read, checked against the headers, and trusted from then on.

The format is in docs/store-format.md. What writes it is `lamina.store`; what both sides must agree on is here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lamina.checkpoint.choose import is_plain_name
from lamina.checkpoint.extent import DTYPE_BITS, Encoding, TensorEntry
from lamina.checkpoint.header import MAX_HEADER_BYTES, is_size, parse_object, quote
from lamina.errors import (
    CheckpointError,
    MissingShardError,
    MissingTensorError,
    RequestError,
    TruncatedError,
    UnsupportedError,
)

MANIFEST = "lamina.json"
JOURNAL = "lamina.split.jsonl"
FORMAT = "lamina store"
VERSION = 1
PLAIN = "plain"
COMPRESSIONS = (PLAIN, "8bit", "4bit", "lossless")
PADDING = "lamina.padding."
METADATA_KEY = "lamina"


def check_compression(compression: str) -> str:
    """The compression itself.

    Raises:
        RequestError: there is none of that name.
    """
    if compression not in COMPRESSIONS:
        known = ", ".join(name for name in COMPRESSIONS if name != PLAIN)
        raise RequestError(f"there is no compression {compression!r}: choose one of {known}, or none at all")
    return compression


class TensorRecord(Protocol):
    """What a manifest says about one tensor."""

    @property
    def dtype(self) -> str:
        """Of the source, in safetensors' terms."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the source."""

    @property
    def codec(self) -> str:
        """`plain`, or a name that `lamina.codec` knows."""

    @property
    def panel_rows(self) -> int:
        """Rows of a panel; 0 where plain."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One weight file: its bytes and their SHA-256 in hexadecimal."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor once it is unpacked, and how it is stored. `panel_rows` is 0 where it is plain."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    panel_rows: int


@dataclass(frozen=True)
class Manifest:
    """What a store is.

    Attributes:
        path: of the manifest itself.
        compression: as it was asked for: `plain`, `8bit`, `4bit`, `lossless`.
        source: the checkpoint that it was made from: its name, revision and files.
        files: weight files by name, and the index.
        tensors: by name.
        small_files: config, tokenizer and chat templates, by their paths in the folder, with slashes; None of a store
            that was written before they were listed.
    """

    path: str
    compression: str
    source: Mapping[str, Any]
    files: Mapping[str, ManifestFile]
    tensors: Mapping[str, ManifestTensor]
    small_files: Mapping[str, ManifestFile] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What is written, without the checksum."""
        small = {} if self.small_files is None else {"small_files": _describe_files(self.small_files)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "compression": self.compression,
            "source": dict(self.source),
            "files": _describe_files(self.files),
            **small,
            "tensors": {name: describe_tensor(tensor) for name, tensor in self.tensors.items()},
        }


def _describe_files(files: Mapping[str, ManifestFile]) -> dict[str, object]:
    return {name: {"bytes": file.nbytes, "sha256": file.sha256} for name, file in files.items()}


def describe_tensor(tensor: TensorRecord) -> dict[str, object]:
    """One tensor as the manifest and the metadata of its file have it."""
    described: dict[str, object] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "codec": tensor.codec}
    return described if tensor.codec == PLAIN else {**described, "panel_rows": tensor.panel_rows}


def count_panels(shape: tuple[int, ...], panel_rows: int) -> int:
    """How many panels hold a tensor: each matrix of its last two dimensions begins a new one."""
    return math.prod(shape[:-2]) * -(-shape[-2] // panel_rows)


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest, its own checksum included: a line for each file and each tensor."""
    lines = [f"{_dump(key)}: {_lines(value)}" for key, value in {**content, "sha256": _own_checksum(content)}.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(value: object) -> str:
    if not isinstance(value, dict) or not any(isinstance(each, dict) for each in value.values()):
        return _dump(value)
    return "{\n" + ",\n".join(f" {_dump(key)}: {_dump(each)}" for key, each in value.items()) + "\n}"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _own_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def partial_store(root: str) -> CheckpointError:
    """The error for a folder with a journal and no manifest."""
    return CheckpointError(
        f"{root} holds a store that is not finished: run the same `lamina split` again, it continues where it stopped"
    )


def read_manifest(root: str) -> Manifest:
    """The manifest of the store in a folder, everything in it checked that can be checked alone.

    Raises:
        UnsupportedError: of a later version.
        CheckpointError: unreadable, damaged, written by hand, or none of ours.
    """
    path = os.path.join(root, MANIFEST)
    return parse_manifest(_read(path), path)


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """The manifest in `raw`; `path` is how errors call it. Raises what `read_manifest` raises."""
    content = parse_object(raw, path, CheckpointError)
    _check_written(content, path)
    compression, source = content.get("compression"), content.get("source")
    if not isinstance(compression, str) or not isinstance(source, dict):
        raise _fault(path, "has no compression or no source")
    files = {name: _file(path, name, info) for name, info in _object(path, content, "files").items()}
    tensors = {name: _tensor(path, name, info) for name, info in _object(path, content, "tensors").items()}
    if not files or not tensors:
        raise _fault(path, "names no files or no tensors")
    small = None
    if "small_files" in content:
        small = {name: _small_file(path, name, info) for name, info in _object(path, content, "small_files").items()}
    return Manifest(path, compression, source, files, tensors, small)


def _check_written(content: dict[str, Any], path: str) -> None:
    """Whether it is of our format, of a version that is read here, and as it was written: its checksum is taken out."""
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not say that it is of the format {FORMAT!r}: remove it, or split again")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise _fault(path, f"has the version {_show(version)}")
    if version > VERSION:
        raise UnsupportedError(f"{path} is of version {version}, this lamina reads {VERSION}: upgrade lamina")
    checksum = content.pop("sha256", None)
    try:
        right = checksum == _own_checksum(content)
    except (UnicodeEncodeError, RecursionError):
        right = False
    if not right:
        raise CheckpointError(f"{path} is not what was written (its checksum differs): split the model again")


def _read(path: str) -> bytes:
    try:
        if os.path.getsize(path) > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_HEADER_BYTES} bytes, too many for a manifest")
        with open(path, "rb") as handle:
            return handle.read()
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc


def check_files(manifest: Manifest, root: str) -> None:
    """Compare the lengths of the files with what the manifest says.

    Raises:
        MissingShardError: one is not there.
        TruncatedError: one is shorter.
        CheckpointError: one is longer.
    """
    for name, file in manifest.files.items():
        path = os.path.join(root, name)
        try:
            nbytes = os.stat(path).st_size
        except OSError:
            raise MissingShardError(f"{MANIFEST} names {name}, which is not in {root}: split the model again") from None
        if nbytes != file.nbytes:
            error = TruncatedError if nbytes < file.nbytes else CheckpointError
            raise error(
                f"{path} has {nbytes} bytes, {MANIFEST} says {file.nbytes}: it was cut or written to, "
                "split the model again"
            )


def weight_files(manifest: Manifest) -> list[str]:
    """Names of the files that hold tensors."""
    return [name for name in manifest.files if name.endswith(".safetensors")]


def apply_manifest(manifest: Manifest, headers: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a store: where the headers say, of the kind that the manifest says.

    Args:
        manifest: as read.
        headers: what the headers of its files hold, padding included.

    Raises:
        MissingTensorError: a tensor of one of them is not in the other.
        CheckpointError: they do not agree about it.
    """
    found = {name: entry for name, entry in headers.items() if not name.startswith(PADDING)}
    for one, other, where in ((manifest.tensors, found, "in no file of it"), (found, manifest.tensors, "not in it")):
        if missing := next((name for name in one if name not in other), None):
            raise MissingTensorError(
                f"tensor {quote(missing)} is {'named by' if one is manifest.tensors else 'beside'} {manifest.path} "
                f"and {where}: split the model again"
            )
    return {name: _unpacked(manifest, manifest.tensors[name], entry) for name, entry in found.items()}


def _unpacked(manifest: Manifest, tensor: ManifestTensor, entry: TensorEntry) -> TensorEntry:
    if tensor.codec == PLAIN:
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise _disagree(manifest, entry, f"{tensor.dtype} of shape {tensor.shape}")
        return entry
    panels = count_panels(tensor.shape, tensor.panel_rows)
    if entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[0] != panels:
        raise _disagree(manifest, entry, f"U8 of shape ({panels}, bytes of a panel)")
    encoding = Encoding(tensor.codec, tensor.panel_rows, entry.shape[1])
    return replace(entry, dtype=tensor.dtype, shape=tensor.shape, encoding=encoding)


def _disagree(manifest: Manifest, entry: TensorEntry, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {quote(entry.name)} in {entry.extent.file} is {entry.dtype} of shape {entry.shape}, "
        f"{manifest.path} makes it {wanted}: split the model again"
    )


def _object(path: str, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise _fault(path, f"has {_show(value)} as its {key}")
    return value


def _file(path: str, name: str, info: Any) -> ManifestFile:
    if not is_plain_name(name) or not name.endswith((".safetensors", ".json")):
        raise CheckpointError(
            f"{path} names the file {quote(name)}, which is no weight file in its own folder: do not trust this store"
        )
    return _described_file(path, name, info)


def _small_file(path: str, name: str, info: Any) -> ManifestFile:
    parts = name.split("/")
    if not all(is_plain_name(part) for part in parts) or name.endswith(".safetensors"):
        raise CheckpointError(
            f"{path} names the file {quote(name)}, which is no small file in its own folder: do not trust this store"
        )
    return _described_file(path, name, info)


def _described_file(path: str, name: str, info: Any) -> ManifestFile:
    if not isinstance(info, dict):
        raise _fault(path, f"describes file {quote(name)} by {_show(info)}")
    nbytes, checksum = info.get("bytes"), info.get("sha256")
    if not is_size(nbytes):
        raise _fault(path, f"gives file {quote(name)} {_show(nbytes)} bytes")
    if not isinstance(checksum, str) or len(checksum) != 64 or not set(checksum) <= set("0123456789abcdef"):
        raise _fault(path, f"gives file {quote(name)} the checksum {_show(checksum)}")
    return ManifestFile(nbytes, checksum)


def _tensor(path: str, name: str, info: Any) -> ManifestTensor:
    if not isinstance(info, dict):
        raise _fault(path, f"describes tensor {quote(name)} by {_show(info)}")
    dtype, shape, codec = info.get("dtype"), info.get("shape"), info.get("codec")
    panel_rows = info.get("panel_rows", 0)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _fault(path, f"gives tensor {quote(name)} the dtype {_show(dtype)}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise _fault(path, f"gives tensor {quote(name)} the shape {_show(shape)}")
    if not isinstance(codec, str) or not codec:
        raise _fault(path, f"gives tensor {quote(name)} the codec {_show(codec)}")
    _check_panels(path, name, shape, codec, panel_rows)
    return ManifestTensor(dtype, tuple(shape), codec, panel_rows)


def _check_panels(path: str, name: str, shape: list[int], codec: str, panel_rows: object) -> None:
    if not is_size(panel_rows) or (panel_rows == 0) != (codec == PLAIN):
        raise _fault(path, f"gives tensor {quote(name)} panels of {_show(panel_rows)} rows")
    if codec != PLAIN and (len(shape) < 2 or not math.prod(shape)):
        raise _fault(path, f"says that tensor {quote(name)} of shape {_show(shape)} is in panels")


def _fault(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}: it is damaged, split the model again")


def _show(value: object) -> str:
    return quote(value) if isinstance(value, str) else quote(str(value))
