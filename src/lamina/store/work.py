"""The work of a split: what is to be written, what of it is there already, the rest, and the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lamina
from lamina.atomic_files import check_room, checksum, is_part, refusals, remove_parts, write_whole
from lamina.caller import another_place
from lamina.checkpoint import open_checkpoint
from lamina.checkpoint.checkpoint import STATED
from lamina.checkpoint.choose import INDEX_FILE, small_files
from lamina.checkpoint.manifest import JOURNAL, MANIFEST, PLAIN, Manifest, ManifestFile, manifest_text, read_manifest
from lamina.checkpoint.mistaken import ADAPTER_CONFIG
from lamina.errors import ChangedError, CheckpointError, RequestError
from lamina.hf.building.build import Request, build
from lamina.hf.trace import trace
from lamina.progress import Progress, Tally
from lamina.store.journal import Finished, Journal, remove_journal
from lamina.store.lock import LOCK, locked
from lamina.store.recipe import check_coded, make_runs
from lamina.store.shards import StoreFile, make_files
from lamina.store.size import estimate, seconds_of
from lamina.store.source import Source, explain_change
from lamina.store.writer import write_file
from lamina.weights.describe import describe

DEEPEST = 2  # folders in folders, in which code that comes with a model may be
SPARE_BYTES = 1 << 20  # for the journal and what the file system needs for itself

Announce = Callable[[str, int, float], None]
"""Told once, before a byte is written: the folder, how many bytes will be, and about how many seconds that takes."""


class Splitter:
    """One split on its way."""

    def __init__(
        self,
        folder: str,
        compression: str,
        source: Source,
        trust_remote_code: bool,
        report: Progress | None,
        announce: Announce | None = None,
    ) -> None:
        self.folder, self.compression, self.report = folder, compression, report or _nowhere
        self.checkpoint, self.identity = source.checkpoint, source.identity()
        self.trust, self.announce = trust_remote_code, announce

    def run(self) -> tuple[Manifest, int]:
        """Write what is missing; the manifest, and how many files were there from before."""
        files = self._plan()
        with made(self.folder), locked(self.folder, lambda: self.report("wait", 0, 0)) as alone:
            found = finished_store(self.folder, self.compression)
            if found is not None:
                if change := explain_change(found.source, self.identity):
                    raise made_from_another(self.folder, change)
                if is_whole(self.folder):  # another process wrote it meanwhile
                    remove_journal(self.folder)
                    return found, len(found.files) - 1
            if alone:
                remove_parts(self.folder)
            journal = self._journal(files, found)
            kept = self._check_kept(files, journal)
            needed = self._needed(files, kept)
            check_room(self.folder, needed)
            left = [file for file in files if file.name not in kept]
            if left and self.announce is not None:
                self.announce(self.folder, needed - SPARE_BYTES, seconds_of(left))
            journal.begin()
            if found is not None:
                with refusals(found.path):
                    os.unlink(found.path)
            self._write(files, journal)
            return self._finish(files, journal), len(kept)

    def _plan(self) -> list[StoreFile]:
        """The files to write. The model is built on tensors without memory, and forgotten again."""
        model = build(Request(self.checkpoint.root, {}, self.trust), self.checkpoint)
        traced = trace(model)
        weights = describe(model, self.checkpoint, traced)
        runs = make_runs(model, self.checkpoint, traced, weights, self.compression)
        check_coded(runs, self.checkpoint.root, self.compression)
        return make_files(runs, padded=self.compression != PLAIN)

    def _journal(self, files: Sequence[StoreFile], found: Manifest | None) -> Journal:
        plan = hashlib.sha256(f"{lamina.__version__} {files!r}".encode()).hexdigest()
        begun = {"compression": self.compression, "source": self.identity, "plan": plan}
        journal = Journal(self.folder, begun)
        if found is not None:  # a store of which a file is gone or damaged: the others are as good as new
            for file in files:
                if (known := found.files.get(file.name)) is not None:
                    tensors = {
                        each.name: found.tensors[each.name] for each in file.tensors if each.name in found.tensors
                    }
                    journal.finished[file.name] = Finished(file.name, known.nbytes, known.sha256, tensors)
        return journal

    def _check_kept(self, files: Sequence[StoreFile], journal: Journal) -> list[str]:
        """Names of the files that are there and whole; the journal forgets the others."""
        tally = Tally(self.report, "check", sum(each.nbytes for each in journal.finished.values()))
        names = {file.name: {each.name for each in file.tensors} for file in files}

        for name, finished in list(journal.finished.items()):
            path = os.path.join(self.folder, name)
            right = os.path.isfile(path) and os.path.getsize(path) == finished.nbytes
            right = right and set(finished.tensors) == names.get(name)
            if not right or checksum(path, tally.add)[1] != finished.sha256:
                del journal.finished[name]
                with refusals(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return list(journal.finished)

    def _needed(self, files: Sequence[StoreFile], kept: Sequence[str]) -> int:
        return estimate([file for file in files if file.name not in kept], self.checkpoint) + SPARE_BYTES

    def _write(self, files: Sequence[StoreFile], journal: Journal) -> None:
        done = sum(file.source_nbytes for file in files if file.name in journal.finished)
        tally = Tally(self.report, "split", sum(file.source_nbytes for file in files), done)
        tally.add(0)
        for file in files:
            if file.name not in journal.finished:
                journal.add(write_file(self.folder, file, self.checkpoint, tally.add))
                self.checkpoint.verify_unchanged()

    def _finish(self, files: Sequence[StoreFile], journal: Journal) -> Manifest:
        """Small files, the index, and the manifest last: with it the store is whole."""
        self.checkpoint.verify_unchanged()
        small = copy_small_files(self.checkpoint.root, self.folder, self.trust)
        finished = [journal.finished[file.name] for file in files]
        index = _index_text(finished, self.checkpoint.dtype).encode()
        listed = {each.name: ManifestFile(each.nbytes, each.sha256) for each in finished}
        listed[INDEX_FILE] = ManifestFile(len(index), write_whole(self.folder, INDEX_FILE, index))
        tensors = {name: tensor for each in finished for name, tensor in each.tensors.items()}
        path = os.path.join(self.folder, MANIFEST)
        manifest = Manifest(path, self.compression, self.identity, listed, tensors, small)
        write_whole(self.folder, MANIFEST, manifest_text(manifest.as_dict()).encode())
        open_checkpoint(self.folder)
        remove_journal(self.folder)
        return manifest


def copy_small_files(root: str, folder: str, trust_remote_code: bool) -> dict[str, ManifestFile]:
    """Config, generation config, tokenizer and chat templates as they are; never a manifest. What was written."""
    copied = {}
    for name in small_files(_names(root), "", trust_remote_code):
        if name in (MANIFEST, ADAPTER_CONFIG):  # an adapter's weights are not copied either
            continue
        target = os.path.join(folder, name)
        with refusals(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            with open(os.path.join(root, name), "rb") as file:
                data = file.read()
        except OSError as error:
            raise CheckpointError(f"{os.path.join(root, name)} cannot be read: {error.strerror}") from error
        copied[name] = ManifestFile(len(data), write_whole(os.path.dirname(target), os.path.basename(target), data))
    return copied


def _names(root: str) -> list[str]:
    """The files of a folder and of those in it, by their paths with slashes; hidden folders are none of the model's."""
    names = []
    for top, folders, found in os.walk(root):
        depth = os.path.relpath(top, root).count(os.sep)
        folders[:] = [each for each in sorted(folders) if not each.startswith(".") and depth < DEEPEST]
        names += [os.path.relpath(os.path.join(top, name), root).replace(os.sep, "/") for name in sorted(found)]
    return names


def _index_text(finished: Sequence[Finished], dtype: str | None) -> str:
    """The index. It says the dtype, which transformers would else judge by the first file, and that is another now."""
    weight_map = {name: each.name for each in finished for name in each.tensors}
    metadata: dict[str, Any] = {"total_size": sum(each.nbytes for each in finished)}
    if dtype is not None:
        metadata["dtype"] = next(word for word, name in STATED.items() if name == dtype)
    content = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def finished_store(folder: str, compression: str) -> Manifest | None:
    """The manifest of a store that is in the folder.

    Raises:
        RequestError: it has another compression.
    """
    if not os.path.isfile(os.path.join(folder, MANIFEST)):
        return None
    manifest = read_manifest(folder)
    if manifest.compression != compression:
        raise RequestError(
            f"{folder} holds a store with compression {manifest.compression}, not {compression}: "
            f"remove it, or {another_place()}"
        )
    return manifest


def is_whole(folder: str) -> bool:
    """Whether the store in a folder opens: manifest, lengths and headers agree, and no small file is gone."""
    try:
        open_checkpoint(folder)
        small = read_manifest(folder).small_files or ()
    except CheckpointError:
        return False
    return all(os.path.isfile(os.path.join(folder, name)) for name in small)


def tidy(folder: str, progress: Progress | None) -> None:
    """Remove what a process left beside a whole store that was killed right after it had written the manifest."""
    names = os.listdir(folder)
    if not any(name in (JOURNAL, LOCK) or is_part(name) for name in names):
        return
    with locked(folder, lambda: (progress or _nowhere)("wait", 0, 0)) as alone:
        if alone and os.path.exists(os.path.join(folder, MANIFEST)) and is_whole(folder):
            remove_parts(folder)
            remove_journal(folder)


def made_from_another(folder: str, why: str) -> ChangedError:
    """The error for a store that was made from another checkpoint, or from another state of this one."""
    return ChangedError(
        f"{folder} is no store of this checkpoint as it is now ({why}): remove it, or {another_place()}"
    )


@contextlib.contextmanager
def made(folder: str) -> Iterator[None]:
    """Make a folder; where what follows fails and leaves nothing in it, it is gone again."""
    existed = os.path.isdir(folder)
    with refusals(folder):
        os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def _nowhere(stage: str, done: int, total: int) -> None:
    del stage, done, total
