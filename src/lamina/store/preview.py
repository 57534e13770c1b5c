"""A checkpoint as it would be if it were split: for a plan of a store that is not written yet."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lamina.atomic_files import check_room, is_part
from lamina.caller import another_place
from lamina.checkpoint import Checkpoint, Extent
from lamina.checkpoint.extent import Encoding, TensorEntry
from lamina.checkpoint.manifest import PLAIN, check_compression
from lamina.errors import WriteError
from lamina.hf.trace import Trace
from lamina.store.recipe import check_coded, make_runs
from lamina.store.shards import StoreFile, header_of, make_files
from lamina.store.source import check_not_encoded
from lamina.weights.describe import Weights

NOT_WRITTEN = "unwritten://"
LOSSLESS_SHARE = 0.685  # of bf16: what it comes to is known only when the numbers were read


def as_if_split(model: Any, checkpoint: Checkpoint, traced: Trace, weights: Weights, compression: str) -> Checkpoint:
    """The checkpoint with the encodings and extents that `split` would give it: to the byte, but for `lossless`.

    Args:
        model: built of the checkpoint; `traced` and `weights` are its trace and schedule.
        compression: `8bit`, `4bit` or `lossless`.

    Raises:
        RequestError: no such compression.
        UnsupportedError: nothing of the checkpoint can be stored so.
    """
    check_not_encoded(checkpoint.root, checkpoint)
    runs = make_runs(model, checkpoint, traced, weights, check_compression(compression))
    check_coded(runs, checkpoint.root, compression)
    tensors = dict(checkpoint.tensors)
    for file in map(_sized, make_files(runs, padded=compression != PLAIN)):
        prefix, places = header_of(file)
        path = f"{NOT_WRITTEN}{checkpoint.root}-{compression}/{file.name}"
        for each in file.tensors:
            at, length = places[each.name]
            encoding = None if each.codec == PLAIN else Encoding(each.codec, each.panel_rows, each.panel_bytes)
            extent = Extent(path, len(prefix) + at, length)
            tensors[each.name] = dataclasses.replace(tensors[each.name], extent=extent, encoding=encoding)
    return dataclasses.replace(checkpoint, tensors=tensors | _tied(model, tensors))


def _tied(model: Any, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Tensors that are the same numbers as another and stored alike, as if they were the other: so they stay tied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    same = [each for each in pairs if all(name in tensors and name in named for name in each)]
    return {
        one: dataclasses.replace(tensors[one], extent=tensors[other].extent)
        for one, other in same
        if named[one] is named[other] and tensors[one].encoding == tensors[other].encoding
    }


def _sized(file: StoreFile) -> StoreFile:
    """The file with a guess where the size of panels depends on the numbers."""
    guessed = {
        each.name: dataclasses.replace(each, panel_bytes=round(LOSSLESS_SHARE * 2 * each.panel_rows * each.columns))
        for each in file.tensors
        if each.codec != PLAIN and not each.panel_bytes
    }
    return file.replace(guessed)


def check_disk(folder: str, checkpoint: Checkpoint) -> None:
    """Refuse to begin a store that cannot be finished.

    Args:
        folder: where it is to be written, or was begun.
        checkpoint: what `as_if_split` gave.

    Raises:
        WriteError: too little room, or a folder that may not be written to.
    """
    ends: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        extent = entry.extent
        ends[extent.file] = max(ends.get(extent.file, 0), extent.offset + extent.length)
    check_room(folder, sum(ends.values()) - _present(folder))
    place = folder
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK | os.X_OK):
        raise WriteError(f"{place} may not be written to by this user", another_place())


def _present(folder: str) -> int:
    """Bytes of the files of a store that was begun."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    files = [os.path.join(folder, name) for name in names if name.endswith(".safetensors") and not is_part(name)]
    return sum(os.path.getsize(file) for file in files)
