"""What is finished of a store: a line for each file, written once the file is whole and has its name.

Without the journal nothing in the folder counts; with it a split continues where it was stopped, for any reason.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.atomic_files import flush_folder, refusals, write_whole
from lamina.caller import another_place
from lamina.checkpoint.manifest import JOURNAL, ManifestTensor, describe_tensor
from lamina.errors import ChangedError, RequestError
from lamina.store.source import explain_change


@dataclass(frozen=True, slots=True)
class Finished:
    """One file that is whole.

    Attributes:
        nbytes, sha256: of the file.
        tensors: how those in it are stored.
    """

    name: str
    nbytes: int
    sha256: str
    tensors: Mapping[str, ManifestTensor]

    def as_line(self) -> str:
        """The record as one line of JSON, its end included."""
        tensors = {name: describe_tensor(tensor) for name, tensor in self.tensors.items()}
        record = {"file": self.name, "bytes": self.nbytes, "sha256": self.sha256, "tensors": tensors}
        return json.dumps(record, ensure_ascii=False) + "\n"


class Journal:
    """The journal of one folder. To be used under the folder's lock.

    Attributes:
        finished: by file name.
    """

    def __init__(self, folder: str, begun: Mapping[str, Any]) -> None:
        """Go on with the journal of a folder, or begin one.

        Args:
            folder: of the store.
            begun: what is being written: compression, source and plan.

        Raises:
            RequestError: another split was begun in this folder.
            ChangedError: it was begun with another source, or with another state of it.
            WriteError: the folder cannot be written to.
        """
        self._folder, self._begun = folder, begun
        self._path = os.path.join(folder, JOURNAL)
        self.finished: dict[str, Finished] = {}
        records = _records(self._path)
        if records:
            _refuse_other(folder, records[0], begun)
            for record in records[1:]:
                if (found := _finished(record)) is not None:
                    self.finished[found.name] = found

    def begin(self) -> None:
        """Write what is known, without anything that a kill left half written."""
        lines = [json.dumps(dict(self._begun), ensure_ascii=False) + "\n"]
        text = "".join(lines + [each.as_line() for each in self.finished.values()])
        write_whole(self._folder, JOURNAL, text.encode())

    def add(self, finished: Finished) -> None:
        """Note a file that is whole."""
        with refusals(self._path):
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                line = finished.as_line().encode()
                while line:
                    line = line[os.write(fd, line) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        self.finished[finished.name] = finished


def remove_journal(folder: str) -> None:
    """The store is whole: it needs no journal any more."""
    path = os.path.join(folder, JOURNAL)
    with refusals(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        flush_folder(folder)


def _records(path: str) -> list[dict[str, Any]]:
    """The lines that are whole, up to the first that is not."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _finished(record: Mapping[str, Any]) -> Finished | None:
    try:
        tensors = {
            str(name): ManifestTensor(each["dtype"], tuple(each["shape"]), each["codec"], each.get("panel_rows", 0))
            for name, each in record["tensors"].items()
        }
        return Finished(str(record["file"]), int(record["bytes"]), str(record["sha256"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _refuse_other(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    remedy = f"remove {folder} to begin anew, or {another_place()}"
    if before.get("compression") != now["compression"]:
        raise RequestError(
            f"{folder} holds the beginning of a split with compression {before.get('compression')}, "
            f"not {now['compression']}: {remedy}"
        )
    source = before.get("source")
    if change := explain_change(source if isinstance(source, dict) else {}, now["source"]):
        raise ChangedError(f"{folder} holds the beginning of a split of another checkpoint ({change}): {remedy}")
    if before.get("plan") != now["plan"]:
        raise RequestError(f"{folder} holds the beginning of a split by another version of lamina: {remedy}")
