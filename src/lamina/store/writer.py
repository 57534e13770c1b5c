"""Writing one file of a store, from the source's rows to a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lamina.atomic_files import NewFile
from lamina.checkpoint import Checkpoint
from lamina.checkpoint.manifest import PADDING, PLAIN, ManifestTensor
from lamina.codec import LOSSLESS
from lamina.store.encode import encoded_chunks, measure, plain_chunks
from lamina.store.journal import Finished
from lamina.store.shards import Stored, StoreFile, header_of
from lamina.store.source import SourceFiles

Report = Callable[[int], None]
"""Called with so many more bytes of the source done."""


def write_file(folder: str, file: StoreFile, checkpoint: Checkpoint, report: Report) -> Finished:
    """Write a file of the store; nothing of it is left where that fails.

    Raises:
        WriteError: the operating system refused.
        ChangedError: the source is not what it was.
    """
    files = SourceFiles(checkpoint.fingerprints)
    try:
        file, measured = _measured(file, checkpoint, files, report)
        prefix, places = header_of(file)
        tensors = {each.name: each for each in file.tensors}
        with NewFile(folder, file.name) as out:
            out.write(prefix)
            for name, (_, length) in places.items():
                if name.startswith(PADDING):
                    out.write(bytes(length))
                else:
                    half = report if name not in measured else lambda nbytes: report(nbytes - nbytes // 2)
                    _write_tensor(out, tensors[name], checkpoint, files, half)
            files.close()  # looks whether the source is still what it was
            checksum = out.commit()
        described = {
            each.name: ManifestTensor(each.dtype, each.shape, each.codec, each.panel_rows) for each in file.tensors
        }
        return Finished(file.name, out.nbytes, checksum, described)
    finally:
        files.close()


def _write_tensor(out: NewFile, tensor: Stored, checkpoint: Checkpoint, files: SourceFiles, report: Report) -> None:
    entry = checkpoint.tensors[tensor.name]
    if tensor.codec == PLAIN:
        for chunk in plain_chunks(entry, files):
            out.write(chunk)
            report(chunk.nbytes)
        return
    before = out.nbytes
    for nbytes, panels in encoded_chunks(tensor, entry, files):
        out.write(panels)
        report(nbytes)
    if out.nbytes - before != tensor.nbytes:
        raise AssertionError(f"{tensor.codec} made {out.nbytes - before} bytes of {tensor.name}, not {tensor.nbytes}")


def _measured(
    file: StoreFile, checkpoint: Checkpoint, files: SourceFiles, report: Report
) -> tuple[StoreFile, frozenset[str]]:
    """The file once the panels whose size depends on the numbers are known, and the names of those measured.

    The tensors of one run get panels of one size, that of the largest. What would not get smaller stays plain.
    """
    found: dict[str, Stored] = {}
    for run in file.runs:
        unknown = [tensor for tensor in run.tensors if tensor.codec != PLAIN and not tensor.panel_bytes]
        if not unknown:
            continue
        needs = [
            measure(tensor, checkpoint.tensors[tensor.name], files, lambda nbytes: report(nbytes // 2))
            for tensor in unknown
        ]
        found |= _sized(unknown, max(needs))
    return file.replace(found), frozenset(found)


def _sized(tensors: list[Stored], panel_bytes: int) -> dict[str, Stored]:
    rows = sum(tensor.matrices * tensor.rows for tensor in tensors)
    smaller = LOSSLESS.saves(panel_bytes, tensors[0].panel_rows, rows, tensors[0].columns)
    return {each.name: replace(each, panel_bytes=panel_bytes) if smaller else each.as_plain() for each in tensors}
