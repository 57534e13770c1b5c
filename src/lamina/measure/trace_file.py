"""The file that a trace goes to: looked at before anything is measured, written beside its place and renamed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.atomic_files import NewFile
from lamina.caller import option
from lamina.errors import RequestError, WriteError

DEFAULT = "lamina-trace.json"
BEGIN = b'{"otherData": {"made by": "lamina"'  # of every trace of ours, which the next one may replace
ROOM = 64 << 20  # bytes of disk that a trace may take
WORDS = 1 << 16  # of JSON, written at once


def check_trace_file(path: str | os.PathLike[str]) -> Path:
    """The path of a trace, once it is sure that it can be written there.

    Raises:
        RequestError: a folder, or a file that is no trace of Lamina's.
        WriteError: it cannot be written, or there is too little room.
    """
    file = Path(path).absolute()
    try:
        if file.is_dir():
            raise RequestError(f"{path} is a folder: give the trace a file name, for example {file.name}/{DEFAULT}")
        if file.exists():
            with file.open("rb") as old:
                if old.read(len(BEGIN)) != BEGIN:
                    raise RequestError(f"{path} exists and is no trace of lamina's: choose another name")
        with _new(file):
            pass
        free = shutil.disk_usage(file.parent).free
    except OSError as error:
        raise _refused(path, error) from error
    if free < ROOM:
        raise WriteError(f"{free >> 20} MiB are free where {path} is to be written, a trace takes up to {ROOM >> 20}")
    return file


def write_trace(file: Path, record: Mapping[str, Any]) -> int:
    """Write a trace as one file, whole or not at all; its bytes.

    Raises:
        WriteError: the operating system refused.
    """
    words = json.JSONEncoder().iterencode(record)
    try:
        with _new(file) as out:
            while text := "".join(itertools.islice(words, WORDS)):
                out.write(text.encode())
            out.commit()
    except OSError as error:
        raise _refused(file, error) from error
    return out.nbytes


def _new(file: Path) -> NewFile:
    return NewFile(str(file.parent), file.name, contextlib.nullcontext)


def _refused(path: str | os.PathLike[str], error: OSError) -> WriteError:
    return WriteError(
        f"cannot write the trace {path}: {error.strerror or error}; choose another place with {option('trace')}"
    )
