"""Deleting what a store was made from: weight files only, after the store was read back, and never through a link."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.atomic_files import flush_folder, refusals
from lamina.errors import ChangedError, CheckpointError
from lamina.progress import Progress
from lamina.store.source import SNAPSHOT
from lamina.store.verify import verify

IN_CACHE = "belongs to the hub's cache, which other programs share: `hf cache` removes it there"


@dataclass(frozen=True, slots=True)
class Deletion:
    """Paths that are gone, and those that were kept, each with the reason."""

    deleted: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def delete_original_files(
    store: str, root: str, files: Mapping[str, Any], progress: Progress | None, *, linked: bool
) -> Deletion:
    """Delete the weight files that a store was made from.

    Args:
        store: folder of the store, which is verified first.
        root: folder of the source.
        files: of the source, by name, as the manifest has them.
        progress: called while verifying.
        linked: the source was reached through a link.

    Raises:
        CheckpointError: the store is damaged; nothing is deleted.
        ChangedError: a source file is not the one that was split; nothing is deleted.
    """
    checked = verify(store, progress=progress)
    if checked.faults:
        first = checked.faults[0]
        raise CheckpointError(f"{store} is damaged ({first.file} {first.what}): nothing of the original was deleted")
    paths = [path for name in files if os.path.lexists(path := os.path.join(root, name))]
    for path in paths:
        _check_same(path, files[os.path.basename(path)])
    kept: dict[str, str] = {}
    deleted: list[str] = []
    for path in paths:
        if why := _why_kept(path, linked):
            kept[path] = why
            continue
        with refusals(path):
            os.unlink(path)
        deleted.append(path)
    if deleted:
        flush_folder(root)
    return Deletion(tuple(deleted), kept)


def _check_same(path: str, known: Mapping[str, Any]) -> None:
    status = os.stat(path)
    if (status.st_size, status.st_mtime_ns) != (known.get("bytes"), known.get("modified_ns")):
        raise ChangedError(f"{path} is not the file that was split: nothing of the original was deleted")


def _why_kept(path: str, linked: bool) -> str:
    if SNAPSHOT.search(os.path.abspath(path)) or (os.path.islink(path) and "/blobs/" in os.path.realpath(path)):
        return IN_CACHE
    if os.path.islink(path):
        return f"is a link to {os.path.realpath(path)}, which others may use: delete that yourself"
    if linked:
        return "was reached through a link to its folder, which others may use: delete it yourself"
    return ""
