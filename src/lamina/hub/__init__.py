"""The hub: from an id to what it says of a repository, and to files in huggingface_hub's own cache.

A model in a local folder needs none of it.
"""

from __future__ import annotations

from lamina.hub.download import local_path, locate, locate_gguf, metadata_folder, outline_gguf
from lamina.hub.repository import ANY_MODEL_OPTIONS, HUB_OPTIONS, SOURCE_OPTIONS, remote_headers

__all__ = [
    "ANY_MODEL_OPTIONS",
    "HUB_OPTIONS",
    "SOURCE_OPTIONS",
    "local_path",
    "locate",
    "locate_gguf",
    "metadata_folder",
    "outline_gguf",
    "remote_headers",
]
