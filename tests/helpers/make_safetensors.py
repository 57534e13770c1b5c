"""Safetensors files written byte by byte, so that a test can also write wrong ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

Spec = tuple[str, list[int], bytes]


def header_of(tensors: dict[str, Spec]) -> dict[str, object]:
    """The header of tensors given as (dtype, shape, data), one behind the other."""
    header: dict[str, object] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header


def with_prefix(header: bytes, data: bytes = b"") -> bytes:
    """A whole file of a header and what follows it."""
    return struct.pack("<Q", len(header)) + header + data


def to_bytes(tensors: dict[str, Spec]) -> bytes:
    """A whole, right file."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **header_of(tensors)}).encode()
    return with_prefix(header, b"".join(data for _, _, data in tensors.values()))


def write(path: Path, tensors: dict[str, Spec]) -> Path:
    """Writes a right file and gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes(tensors))
    return path


def vector(*values: int) -> Spec:
    """A one-dimensional U8 tensor."""
    return "U8", [len(values)], bytes(values)


def write_sharded(root: Path, shards: dict[str, dict[str, Spec]], name: str = "model.safetensors.index.json") -> Path:
    """Writes shards and the index that names their tensors, and gives the folder."""
    for file, tensors in shards.items():
        write(root / file, tensors)
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (root / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return root
