"""What a reader of quantised weights may look at, and what several of them share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lamina.checkpoint import Checkpoint, TensorEntry
from lamina.codec.quantized_layouts import Awq, Float4, Packed, Scaled
from lamina.errors import CheckpointError, UnsupportedError

Entries = Mapping[str, TensorEntry]


FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


MOST_STATE_BYTES = 1 << 16  # of the JSON beside a weight of bitsandbytes


_BYTES_OF_INTEGERS = {"I64": 8, "I32": 4}


@dataclass(frozen=True)
class Found:
    """A weight of which the checkpoint holds the parts.

    Attributes:
        sources: the tensors that it is unpacked from.
        beside: tensors that only describe it.
    """

    name: str
    packed: Packed
    sources: tuple[str, ...]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """What a method's reader may look at."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def entries(self) -> Entries:
        """The checkpoint's tensors, by name."""
        return self.checkpoint.tensors


Reader = Callable[[Folder], Iterator[Found]]


def ending_in(folder: Folder, ending: str) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors whose names end so, each with what stands before."""
    for name, entry in folder.entries.items():
        if name.endswith(ending):
            yield name.removesuffix(ending), entry


def part_of(folder: Folder, name: str, companion: TensorEntry | None) -> TensorEntry:
    """The tensor of this name.

    Args:
        companion: what it should lie beside.

    Raises:
        CheckpointError: there is none.
    """
    entry = folder.entries.get(name)
    if entry is None:
        wanted = f" beside {companion.name}" if companion is not None else ""
        raise CheckpointError(
            f"{folder.checkpoint.root} has no tensor {name!r}{wanted}: it is incomplete, fetch it again"
        )
    return entry


def unfit(weight: TensorEntry, scale: TensorEntry) -> CheckpointError:
    """The error for two tensors of which one cannot be the scales, or another part, of the other."""
    return CheckpointError(
        f"{scale.name} of shape {scale.shape} does not fit {weight.name} of shape {weight.shape} "
        f"in {os.path.basename(weight.extent.file)}: the checkpoint is damaged, or in a layout that is not known here"
    )


def count_of(entry: TensorEntry) -> int:
    """Elements of a stored tensor."""
    return torch.Size(entry.shape).numel()


def len_of(entry: TensorEntry) -> int:
    """Indices of the first dimension of a stored tensor; 1 for a single number."""
    return max(entry.shape[0], 1) if entry.shape else 1


def scaled_weight(folder: Folder, weight: TensorEntry, scale: TensorEntry, block: Any) -> Found:
    """A weight of one number for each element, with one scale, one for each row, or a grid of them.

    Args:
        block: rows and columns that share a scale, None where only the shapes tell.

    Raises:
        CheckpointError: scales of a shape that does not fit.
    """
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (1, *weight.shape)
    if count_of(scale) == 1:
        grid = (1, 1)
    elif len(scale.shape) == 1:
        grid = (scale.shape[0], 1)
    else:
        grid = (scale.shape[-2], scale.shape[-1])
    high, wide = block if block and len(block) == 2 else (None, None)
    blocks = _block(rows, grid[0], high), _block(columns, grid[1], wide)
    matrices = 1 if len(weight.shape) < 3 else count_of(weight) // (rows * columns)
    if blocks[0] is None or blocks[1] is None or count_of(scale) not in (1, matrices * grid[0] * grid[1]):
        raise unfit(weight, scale)
    packed = Scaled(weight.shape, folder.dtype, grid, (blocks[0], blocks[1]))
    return Found(weight.name, packed, (weight.name, scale.name))


def _block(size: int, parts: int, wanted: int | None) -> int | None:
    """How many rows or columns share a scale, None where it is unknown; the last block may be smaller."""
    if wanted and -(-size // wanted) == parts:
        return wanted
    return size // parts if parts and size % parts == 0 else None


def float4_weight(
    folder: Folder, name: str, packed: TensorEntry, scale: TensorEntry, shape: tuple[int, ...], divisor: str = ""
) -> Found:
    """A weight of E2M1 numbers, two to a byte.

    Args:
        name: of the weight.
        shape: of the weight.
        divisor: the name of the one number that all scales are divided by, where the checkpoint has it.

    Raises:
        CheckpointError: scales of a shape that does not fit.
    """
    columns = shape[-1]
    if not scale.shape or scale.shape[:-1] != shape[:-1] or columns % scale.shape[-1]:
        raise unfit(packed, scale)
    sources: tuple[str, ...] = (packed.name, scale.name)
    if divisor in folder.entries:
        sources = (*sources, divisor)
    return Found(name, Float4(shape, folder.dtype, columns // scale.shape[-1]), sources)


def nibbles_weight(
    folder: Folder,
    module: str,
    words: TensorEntry,
    zeros: TensorEntry,
    scales: TensorEntry,
    order: tuple[int, ...],
    signed: bool,
) -> Found:
    """Eight outputs in a word: the words of each input, and the zero points and scales of each group of inputs."""
    if len(words.shape) != 2:
        raise unfit(words, scales)
    columns, rows = words.shape[0], words.shape[1] * 8
    if scales.shape[1:] != (rows,) or zeros.shape != (len_of(scales), words.shape[1]) or columns % len_of(scales):
        raise unfit(words, scales)
    packed = Awq((rows, columns), folder.dtype, columns // len_of(scales), order, signed)
    return Found(f"{module}.weight", packed, (words.name, zeros.name, scales.name))


def bytes_of(folder: Folder, entry: TensorEntry) -> bytes:
    """What a small tensor holds that describes others."""
    extent = entry.extent
    if "://" in extent.file:
        raise UnsupportedError(
            f"shapes of {folder.checkpoint.root} are in its weight files, not in their headers: download it first"
        )
    try:
        with open(extent.file, "rb") as handle:
            handle.seek(extent.offset)
            return handle.read(min(extent.length, MOST_STATE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{entry.name} in {extent.file} cannot be read: {error.strerror}") from error


def integers_in(folder: Folder, entry: TensorEntry) -> tuple[int, ...]:
    """The integers of a small tensor."""
    size = _BYTES_OF_INTEGERS.get(entry.dtype)
    if size is None:
        raise CheckpointError(f"{entry.name} in {entry.extent.file} is {entry.dtype}, not integers: fetch it again")
    raw = bytes_of(folder, entry)
    return tuple(int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size))


def json_of(folder: Folder, entry: TensorEntry) -> Mapping[str, Any]:
    """The JSON that a tensor of bytes holds."""
    extent = entry.extent
    try:
        state = json.loads(bytes_of(folder, entry))
    except ValueError as error:
        raise CheckpointError(f"{entry.name} in {extent.file} is no JSON: fetch it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{entry.name} in {extent.file} is no JSON object: fetch it again")
    return state
