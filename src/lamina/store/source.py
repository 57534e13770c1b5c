"""The checkpoint that is split: where it is, what it is, and its bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint import Checkpoint, Extent, Fingerprint, open_checkpoint
from lamina.errors import ChangedError, CheckpointError, ReadError, TruncatedError, UnsupportedError
from lamina.hf.config import refuse_adapter
from lamina.hub import locate
from lamina.progress import Progress
from lamina.retry import patiently
from lamina.tensors.torch_pickle import read_pickled

SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        model: as it was asked for; of a local one the last part of its path.
        revision: its commit, where it came from the hub.
        checkpoint: its tensors.
    """

    model: str
    revision: str | None
    checkpoint: Checkpoint

    def identity(self) -> dict[str, Any]:
        """What tells whether a store was made from this very checkpoint."""
        files = {
            os.path.basename(file): {
                "bytes": found.size,
                "modified_ns": found.mtime_ns,
                "headers": _headers(self, file),
            }
            for file, found in self.checkpoint.fingerprints.items()
        }
        return {"model": self.model, "revision": self.revision, "files": dict(sorted(files.items()))}


def open_source(
    model: str, *, trust_remote_code: bool, variant: str | None, progress: Progress | None, **hub: Any
) -> Source:
    """The checkpoint of a model, downloaded first where it is on the hub.

    Raises:
        UnsupportedError: its weights are encoded already.
        ModelNotFoundError, CheckpointError and others: as `lamina.hub.locate` and `open_checkpoint`.
    """
    path = os.path.expanduser(model)
    names = os.listdir(path) if os.path.isdir(path) else [path]
    if {os.path.splitext(name)[1].lower() for name in names} & {".gguf", ".safetensors", ".bin"} == {".gguf"}:
        raise UnsupportedError(f"{model} is small already and streams as it is: a GGUF file needs no split")
    if is_local := os.path.exists(path):
        found = path
    else:
        found = locate(model, variant=variant, progress=progress, trust_remote_code=trust_remote_code, **hub)
    checkpoint = open_checkpoint(
        found, variant=variant, subfolder=hub.get("subfolder") or "", read_pickled=read_pickled
    )
    check_not_encoded(model, checkpoint)
    refuse_adapter(checkpoint.root, model)
    commit = SNAPSHOT.search(os.path.abspath(found))
    return Source(_name(path) if is_local else model, commit[1] if commit else None, checkpoint)


def check_not_encoded(model: str, checkpoint: Checkpoint) -> None:
    """Refuse what is in few bits already.

    Raises:
        UnsupportedError: a tensor is encoded.
    """
    for entry in checkpoint.tensors.values():
        if entry.encoding is not None:
            raise UnsupportedError(
                f"{model} is stored as {entry.encoding.codec} already (tensor {entry.name!r}): "
                "split the checkpoint that it was made from"
            )


def local_root(path: str) -> str:
    """The folder of a local model, which may have been given as one of its files."""
    path = os.path.abspath(os.path.expanduser(path))
    return path if os.path.isdir(path) else os.path.dirname(path)


def _name(path: str) -> str:
    return os.path.basename(os.path.realpath(local_root(path)))


def _headers(source: Source, file: str) -> str:
    """A checksum of what the header of a file says, in any format."""
    entries = sorted(
        (entry.name, entry.dtype, entry.shape, entry.extent.offset, entry.extent.length)
        for entry in source.checkpoint.tensors.values()
        if entry.extent.file == file
    )
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def explain_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In which of its files a source differs from what it was; None where it does not."""
    old, new = before.get("files"), now.get("files")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "it says nothing about its source"
    if missing := sorted(set(old) - set(new)):
        return f"{missing[0]} is no longer part of it"
    if added := sorted(set(new) - set(old)):
        return f"{added[0]} was no part of it"
    for name, file in new.items():
        if file != old[name]:
            return f"{name} was written to since then"
    return None


def explain_age(identity: Mapping[str, Any], model: str, root: str, commit: str | None) -> str | None:
    """Why a store with this source was not made from a model as it is now; None where nothing speaks against it.

    Weight files that are gone do not: they may have been deleted because the store is enough.

    Args:
        identity: of the source, as a manifest has it.
        model: path or hub id.
        root: folder of its weights where it is local, else empty.
        commit: of the hub, where it is known.
    """
    name = _name(model) if root else model
    if identity.get("model") != name:
        return f"it was made from {identity.get('model')}"
    if commit is not None and identity.get("revision") != commit:
        return f"it was made from revision {identity.get('revision')}, which is not {commit}"
    files = identity.get("files")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        return "it says nothing about its source"
    for file, known in files.items() if root else ():
        try:
            status = os.stat(os.path.join(root, file))
        except OSError:
            continue
        if (status.st_size, status.st_mtime_ns) != (known.get("bytes"), known.get("modified_ns")):
            return f"{file} was written to since then"
    return None


class SourceFiles:
    """Reads extents of the source, and notices when a file is not what it was."""

    def __init__(self, fingerprints: Mapping[str, Fingerprint]) -> None:
        self._fingerprints = fingerprints
        self._file: io.FileIO | None = None
        self._buffer = bytearray()

    def read(self, extent: Extent, at: int, nbytes: int) -> memoryview:
        """Bytes of an extent; they stay until the next call.

        Raises:
            ChangedError: the file was written to or replaced.
            TruncatedError: it ends too early.
            ReadError: the operating system refused.
        """
        file = self._open(extent.file)
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        view, done, offset = memoryview(self._buffer)[:nbytes], 0, extent.offset + at
        try:
            file.seek(offset)
            while done < nbytes:
                got = patiently(functools.partial(file.readinto, view[done:]))
                if not got:
                    raise TruncatedError(f"{extent.file} ends at byte {offset + done}: it was cut while it was split")
                done += got
            if hasattr(os, "posix_fadvise"):  # what was read is not read again; what follows is
                os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(file.fileno(), offset + nbytes, nbytes, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise ReadError(f"reading {extent.file} at byte {offset + done} failed: {error.strerror}") from error
        return view

    def _open(self, path: str) -> io.FileIO:
        if self._file is not None and self._file.name == path:
            return self._file
        self.close()
        try:
            self._file = io.FileIO(path)
        except FileNotFoundError:
            raise ChangedError(f"{path} is gone since the split began: put it back, or split again") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._check(self._file)
        return self._file

    def _check(self, file: io.FileIO) -> None:
        status = os.fstat(file.fileno())
        wanted = self._fingerprints.get(str(file.name))
        now = Fingerprint.of(status)
        if wanted is not None and (wanted[:2] != now[:2] or (wanted.place == now.place and wanted.touched(now))):
            raise ChangedError(f"{file.name!s} was written to while it was split: run lamina split again")

    def close(self) -> None:
        """Close what is open, after a last look whether it is still what it was."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                self._check(file)
