"""From a hub id and the name of a GGUF file to that file on this machine, with all the parts of a split one."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lamina.checkpoint.choose import check_subfolder
from lamina.checkpoint.gguf_name import choose_gguf, local_names, part_names
from lamina.checkpoint.hub import download_files, remember_commit
from lamina.checkpoint.hub_errors import clear_errors
from lamina.checkpoint.repository import HubRequest, Listing, Token, in_subfolder, list_repository, offline
from lamina.errors import MissingShardError, RequestError, UnsupportedError
from lamina.progress import Progress


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
    wanted: bool = True,
) -> str:
    """The local path of a GGUF file of a repository, after a download where it is needed.

    Args:
        model: a hub id.
        name: of the file, or of any part of a split one, in the repository's `subfolder`; or a tag such as `Q4_K_M`
            that one of its files has in its name.
        wanted: download it; else it is only looked for in the cache.
        revision, cache_dir, token, local_files_only, subfolder, progress: as for `lamina.checkpoint.hub.locate`.

    Raises:
        ModelNotFoundError: no such repository.
        UnsupportedError: it is not here and not wanted.
        RequestError: the repository has no such file, or several; gated, a revision that is not there, a refused token.
        MissingShardError: the cache alone may be used and does not have it, or the repository lacks a part.
        CheckpointError: no connection, no space.
    """
    request = HubRequest(model, revision, cache_dir, token, check_subfolder(subfolder))
    listing = None if local_files_only else list_repository(request)
    if not isinstance(listing, Listing):
        why, there = listing or offline(), _cached_names(request)
        if not there:
            raise MissingShardError(f"{name} of {model} is not in the cache, and {why}: run with the network")
        try:
            chosen = _chosen(request, there, name)
        except RequestError as error:
            raise MissingShardError(f"in the cache, {error}; and {why}") from None
        return _in_cache(request, part_names(chosen), why)
    names = part_names(_chosen(request, listing.files, name))
    if missing := next((each for each in names if each not in listing.files), None):
        raise MissingShardError(f"{name} of {model} needs {missing}, which the repository does not have")
    if not wanted:
        try:
            return _in_cache(request, names, "")
        except MissingShardError:
            raise UnsupportedError(
                f"a GGUF file is planned from its own header: download {names[0]} of {model} first, "
                f"with `hf download {model} {' '.join(names)}`"
            ) from None
    with clear_errors(model, revision):
        remember_commit(request)
        folder = download_files(request, listing, {each: listing.files[each] for each in names}, progress)
    return os.path.join(folder, names[0])


def _chosen(request: HubRequest, names: Iterable[str], choice: str) -> str:
    """The path in the repository of the file that is meant."""
    exact = in_subfolder(request, choice)
    own = [name for name in names if name.startswith(in_subfolder(request, ""))]
    return exact if exact in own else choose_gguf(own, choice, request.model)


def _cached_names(request: HubRequest) -> list[str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with clear_errors(request.model, request.revision, but=LocalEntryNotFoundError):
            folder = snapshot_download(
                request.model,
                revision=request.revision,
                cache_dir=request.cache_dir,
                local_files_only=True,
                allow_patterns=[],
            )
    except LocalEntryNotFoundError:
        return []
    return local_names(folder)


def _in_cache(request: HubRequest, names: list[str], why: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(request.model, name, request.cache_dir, request.revision) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if not isinstance(path, str)]:
        raise MissingShardError(f"{missing[0]} of {request.model} is not in the cache, and {why}: run with the network")
    return str(found[0])
