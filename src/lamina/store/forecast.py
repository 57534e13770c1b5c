"""A checkpoint as it would be if it were split: for a plan of a store that nobody has written yet."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lamina.checkpoint import Checkpoint, Extent
from lamina.checkpoint.extent import Encoding
from lamina.checkpoint.store import PLAIN, check_compression
from lamina.model.trace import Trace
from lamina.model.weights import Weights
from lamina.store.recipe import make_runs

LOSSLESS_SHARE = 0.685  # of bf16: what it comes to is known only when the numbers were read


def as_if_split(model: Any, checkpoint: Checkpoint, traced: Trace, weights: Weights, compression: str) -> Checkpoint:
    """The checkpoint with the encodings, and extents of the lengths, that `split` would give it.

    Args:
        model: built of the checkpoint; `traced` and `weights` are its trace and schedule.
        compression: `8bit`, `4bit` or `lossless`.

    Raises:
        RequestError: no such compression.
    """
    at = 0
    tensors = dict(checkpoint.tensors)
    for run in make_runs(model, checkpoint, traced, weights, check_compression(compression)):
        for each in run.tensors:
            if each.codec == PLAIN:
                continue
            panel_bytes = each.panel_bytes or round(LOSSLESS_SHARE * 2 * each.panel_rows * each.columns)
            length = each.matrices * math.ceil(each.rows / each.panel_rows) * panel_bytes
            extent = Extent(f"{checkpoint.root}-{compression}", at, length)
            encoding = Encoding(each.codec, each.panel_rows, panel_bytes)
            tensors[each.name] = dataclasses.replace(tensors[each.name], extent=extent, encoding=encoding)
            at += length
    return dataclasses.replace(checkpoint, tensors=tensors)
