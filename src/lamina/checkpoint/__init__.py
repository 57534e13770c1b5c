"""What is on disk: headers, extents, whole checkpoints.

Knows bytes and names. Does not know models, tensors in memory, or who reads the bytes.
"""

from __future__ import annotations

from lamina.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lamina.checkpoint.extent import DTYPE_BITS, DTYPE_BYTES, Extent, TensorEntry
from lamina.checkpoint.header import Fingerprint, parse_header, read_header

__all__ = [
    "DTYPE_BITS",
    "DTYPE_BYTES",
    "Checkpoint",
    "Extent",
    "Fingerprint",
    "TensorEntry",
    "open_checkpoint",
    "parse_header",
    "read_header",
]
