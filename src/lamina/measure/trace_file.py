"""The file that a trace goes to: looked at before anything is measured, written beside its place and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.caller import option
from lamina.errors import RequestError, WriteError

DEFAULT = "lamina-trace.json"
BEGIN = b'{"otherData": {"made by": "lamina"'  # of every trace of ours, which the next one may replace
ROOM = 64 << 20  # bytes of disk that a trace may take


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
        with _beside(file).open("wb"):
            pass
        _beside(file).unlink()
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
    beside = _beside(file)
    try:
        with beside.open("w", encoding="utf-8") as out:
            json.dump(record, out)
            out.flush()
            os.fsync(out.fileno())
            nbytes = out.tell()
        beside.replace(file)
    except OSError as error:
        raise _refused(file, error) from error
    finally:
        beside.unlink(missing_ok=True)
    return nbytes


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _refused(path: str | os.PathLike[str], error: OSError) -> WriteError:
    return WriteError(
        f"cannot write the trace {path}: {error.strerror or error}; choose another place with {option('trace')}"
    )
