"""torch's dtypes by the names that checkpoints have for them."""

from __future__ import annotations

import torch

from lamina.checkpoint import TensorEntry
from lamina.errors import UnsupportedError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """torch's dtype for a checkpoint tensor.

    Raises:
        UnsupportedError: torch has none.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise UnsupportedError(
            f"tensor {entry.name!r} in {entry.extent.file} has dtype {entry.dtype}, "
            f"which torch {torch.__version__} lacks"
        )
    return TORCH_DTYPES[entry.dtype]
