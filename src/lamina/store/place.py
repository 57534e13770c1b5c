"""Where a store goes by default, and what may be there already."""

from __future__ import annotations

import os
from typing import Any

from lamina.atomic_files import is_part
from lamina.caller import another_place
from lamina.checkpoint.manifest import JOURNAL, MANIFEST, read_manifest
from lamina.errors import RequestError
from lamina.hub import local_path, metadata_folder
from lamina.store.lock import LOCK
from lamina.store.source import local_root


def default_folder(
    model: str | os.PathLike[str],
    compression: str,
    saving_path: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
    **hub: Any,
) -> str:
    """The folder of a model's store.

    Beside the model's own folder for a local one; for one of the hub in the folder `lamina` of the hub's cache, under
    the name of its commit.

    Args:
        model: local folder or file, or hub id.
        compression: `plain`, `8bit`, `4bit` or `lossless`.
        saving_path: a folder for stores, in place of either.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`.
    """
    if (path := local_path(model)) is not None:
        own = local_root(path)
        return os.path.join(saving_path or os.path.dirname(own), f"{os.path.basename(own)}-{compression}")
    folder = metadata_folder(model, trust_remote_code=trust_remote_code, **hub)
    name = f"{os.fspath(model).replace('/', '--')}-{os.path.basename(folder)[:12]}-{compression}"
    return os.path.join(saving_path or _cache(hub.get("cache_dir")), name)


def is_store_of(model: str | os.PathLike[str], compression: str) -> bool:
    """Whether a local folder holds a finished store with this compression."""
    folder = os.path.abspath(os.path.expanduser(os.fspath(model)))
    return os.path.isfile(os.path.join(folder, MANIFEST)) and read_manifest(folder).compression == compression


def _cache(cache_dir: str | None) -> str:
    from huggingface_hub import constants

    return os.path.join(os.path.expanduser(cache_dir or constants.HF_HOME), "lamina")


def check_place(folder: str, root: str) -> None:
    """Refuse to write among what is not ours.

    Args:
        folder: of the store.
        root: of the source.

    Raises:
        RequestError: the folder is the source's own, a file, or holds something else.
    """
    if os.path.realpath(folder) == os.path.realpath(root):
        raise RequestError(f"{folder} is the model's own folder: {another_place()}")
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise RequestError(f"{folder} is no folder: {another_place()}")
    names = os.listdir(folder)
    if MANIFEST in names or JOURNAL in names:
        return
    if others := sorted(name for name in names if name != LOCK and not is_part(name)):
        raise RequestError(f"{folder} is not empty ({others[0]} is in it): {another_place()}")
