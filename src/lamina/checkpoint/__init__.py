"""What is on disk: headers, extents, whole checkpoints, and how they come from the hub.

Knows bytes and names. Does not know models, tensors in memory, or who reads the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamina.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lamina.checkpoint.extent import DTYPE_BITS, DTYPE_BYTES, Extent, TensorEntry
from lamina.checkpoint.header import Fingerprint, parse_header, read_header

if TYPE_CHECKING:
    from lamina.checkpoint.hub import locate, metadata_folder, remote_headers

__all__ = [
    "DTYPE_BITS",
    "DTYPE_BYTES",
    "Checkpoint",
    "Extent",
    "Fingerprint",
    "TensorEntry",
    "locate",
    "metadata_folder",
    "open_checkpoint",
    "parse_header",
    "read_header",
    "remote_headers",
]


def __getattr__(name: str) -> Any:
    """The hub's side is imported when it is asked for: a local folder needs none of it."""
    if name in ("locate", "metadata_folder", "remote_headers"):
        from lamina.checkpoint import hub

        return getattr(hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
