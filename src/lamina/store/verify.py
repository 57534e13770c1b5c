"""Reading a store back: is every byte what was written?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lamina.atomic_files import checksum
from lamina.checkpoint import open_checkpoint
from lamina.checkpoint.manifest import JOURNAL, MANIFEST, ManifestFile, partial_store, read_manifest
from lamina.errors import CheckpointError, RequestError
from lamina.progress import Progress, Tally


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not what was written, and in which way."""

    file: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What a look at every byte of a store found.

    Attributes:
        folder: of the store.
        compression: how it is stored.
        files: how many were read.
        bytes: of them.
        faults: what is wrong; empty where nothing is.
        small_files: how many of the files are config, tokenizer and the like; None where the store is of a lamina that
            did not list them, so that they were not compared.
    """

    folder: str
    compression: str
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    small_files: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def verify(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> Verification:
    """Read every file of a store and compare it with the manifest; what is read comes from the drive.

    Args:
        folder: of the store.
        progress: called with ("verify", bytes done, bytes in all).

    Raises:
        RequestError: the folder holds no store.
        CheckpointError: the store is not finished, or its manifest is damaged.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(folder)))
    try:
        names = os.listdir(root)
    except OSError as error:
        raise RequestError(f"{root} cannot be listed ({error.strerror}): give the folder of a store") from None
    if MANIFEST not in names:
        if JOURNAL in names:
            raise partial_store(root)
        raise RequestError(f"{root} holds no store: it has no {MANIFEST}; `lamina split` makes one")
    manifest = read_manifest(root)
    small = manifest.small_files
    listed = {**manifest.files, **(small or {})}
    total = sum(file.nbytes for file in listed.values())
    tally = Tally(progress, "verify", total)
    tally.add(0)
    faults = []
    for name, file in listed.items():
        end = tally.done + file.nbytes
        if what := _difference(os.path.join(root, name), file, tally.add):
            faults.append(Fault(name, what))
        tally.reach(end)
    if not faults:
        open_checkpoint(root)  # the manifest against the headers
    count = None if small is None else len(small)
    return Verification(root, manifest.compression, len(listed), total, tuple(faults), count)


def _difference(path: str, file: ManifestFile, seen: Callable[[int], None]) -> str:
    """How a file differs from what was written; empty where it does not. `seen` is called with bytes read."""
    try:
        nbytes, digest = checksum(path, seen)
    except CheckpointError as error:
        return str(error)
    if nbytes != file.nbytes:
        return f"has {nbytes} bytes, {file.nbytes} were written"
    return "" if digest == file.sha256 else "has other bytes than were written: its SHA-256 differs"
