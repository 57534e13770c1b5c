"""`lamina split`: a checkpoint written again, unit by unit, in the order in which it is read, and smaller if wanted.

What is written is an ordinary folder of safetensors files with one manifest beside them (docs/store-format.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamina.store.verify import Fault, Verification, verify

if TYPE_CHECKING:
    from lamina.store.place import default_folder, is_store_of
    from lamina.store.preview import as_if_split, check_disk
    from lamina.store.splitting import SplitResult, split

__all__ = [
    "Fault",
    "SplitResult",
    "Verification",
    "as_if_split",
    "check_disk",
    "default_folder",
    "is_store_of",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What builds a model brings torch and transformers: it is imported when it is asked for."""
    if name in ("default_folder", "is_store_of"):
        from lamina.store import place

        return getattr(place, name)
    if name in ("as_if_split", "check_disk"):
        from lamina.store import preview

        return getattr(preview, name)
    if name in ("SplitResult", "split"):
        from lamina.store import splitting

        return getattr(splitting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
