"""From a hub id and the name of a GGUF file to that file on this machine, with all the parts of a split one."""

from __future__ import annotations

import os

from lamina.checkpoint.choose import check_subfolder
from lamina.checkpoint.gguf import part_names
from lamina.checkpoint.hub import Progress, download_files, remember_commit
from lamina.checkpoint.hub_errors import clear_errors
from lamina.checkpoint.repository import Listing, Request, Token, in_subfolder, list_repository, offline
from lamina.checkpoint.strict import quote
from lamina.errors import MissingShardError, RequestError


def locate_gguf(
    model: str,
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: Token = None,
    local_files_only: bool = False,
    subfolder: str = "",
    progress: Progress | None = None,
) -> str:
    """The local path of a GGUF file of a repository, after a download where it is needed.

    Args:
        model: a hub id.
        name: of the file, or of any part of a split one, in the repository's `subfolder`.
        revision, cache_dir, token, local_files_only, subfolder, progress: as for `lamina.checkpoint.hub.locate`.

    Raises:
        ModelNotFoundError: no such repository.
        RequestError: the repository has no such file; gated, a revision that is not there, a refused token.
        MissingShardError: the cache alone may be used and does not have it, or the repository lacks a part.
        CheckpointError: no connection, no space.
    """
    request = Request(model, revision, cache_dir, token, check_subfolder(subfolder))
    names = [in_subfolder(request, each) for each in part_names(name)]
    listing = None if local_files_only else list_repository(request)
    if not isinstance(listing, Listing):
        return _in_cache(request, names, listing or offline())
    if in_subfolder(request, name) not in listing.files:
        there = sorted(each for each in listing.files if each.lower().endswith(".gguf"))
        others = (
            f": it has {', '.join(there[:8])}{' and others' if len(there) > 8 else ''}" if there else ", nor any GGUF"
        )
        raise RequestError(f"{model} has no file {quote(in_subfolder(request, name))}{others}")
    if missing := next((each for each in names if each not in listing.files), None):
        raise MissingShardError(f"{name} of {model} needs {missing}, which the repository does not have")
    with clear_errors(model, revision):
        remember_commit(request)
        folder = download_files(request, listing, {each: listing.files[each] for each in names}, progress)
    return os.path.join(folder, names[0])


def _in_cache(request: Request, names: list[str], why: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(request.model, name, request.cache_dir, request.revision) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if not isinstance(path, str)]:
        raise MissingShardError(f"{missing[0]} of {request.model} is not in the cache, and {why}: run with the network")
    return str(found[0])
