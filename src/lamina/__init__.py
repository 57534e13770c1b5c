"""Run language models that are bigger than memory: the weights stay on disk and stream through a small window."""

from __future__ import annotations

from lamina.errors import (
    BudgetError,
    ChangedError,
    CheckpointError,
    ClosedError,
    HeaderError,
    LaminaError,
    MissingShardError,
    MissingTensorError,
    ModelNotFoundError,
    ReadError,
    RequestError,
    StorageError,
    TokenError,
    TruncatedError,
    UnsupportedError,
    WriteError,
)
from lamina.fallbacks import FallbackWarning

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than all else here: Ctrl-C may come meanwhile
if TYPE_CHECKING:
    from typing import Any

    from lamina.api import AutoModel, plan_model

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "BudgetError",
    "ChangedError",
    "CheckpointError",
    "ClosedError",
    "FallbackWarning",
    "HeaderError",
    "LaminaError",
    "MissingShardError",
    "MissingTensorError",
    "ModelNotFoundError",
    "ReadError",
    "RequestError",
    "StorageError",
    "TokenError",
    "TruncatedError",
    "UnsupportedError",
    "WriteError",
    "__version__",
    "plan_model",
]


def __getattr__(name: str) -> Any:
    """`AutoModel` and `plan_model` bring torch and transformers: they are imported when they are asked for."""
    if name in ("AutoModel", "plan_model"):
        import lamina.api

        return getattr(lamina.api, name)
    raise AttributeError(f"module 'lamina' has no attribute {name!r}")
