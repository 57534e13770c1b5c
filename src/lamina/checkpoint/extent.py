"""Where a tensor lies: which file, at which byte, how many bytes, and what those bytes mean."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, for every dtype name of safetensors 0.8 (its `Dtype` in safetensors/src/tensor.rs)."""

DTYPE_BYTES: dict[str, int] = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
"""Bytes of one element; the dtypes that pack several elements into a byte have no entry."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file.

    Attributes:
        file: absolute path, or `hf://{id}@{revision}/{name}` for a file that is still on the hub.
        offset: first byte, counted from the start of the file.
        length: bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """How bytes hold the elements of a tensor, where they are not simply one after another.

    The tensor is seen as a matrix: its last dimension are the columns, all others together the rows. Rows are
    cut into panels, each of which can be read and unpacked alone; a panel never straddles two matrices of a
    tensor of three dimensions. Panels lie one after another, all with the same number of bytes.

    Attributes:
        codec: a name that `lamina.codec.codec_for` knows.
        panel_rows: rows of a panel; the last panel may have fewer.
        panel_bytes: bytes of a panel, the last one included.
    """

    codec: str
    panel_rows: int
    panel_bytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: the name in the checkpoint, which transformers may rename when it loads.
        dtype: of its elements once unpacked: safetensors' name, a key of `DTYPE_BITS`.
        shape: in elements, once unpacked; `()` is one element.
        extent: where its bytes lie; row-major and little-endian where there is no encoding.
        encoding: what its bytes are; None for plain elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent
    encoding: Encoding | None = None
