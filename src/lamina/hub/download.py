"""From the name that a user gives to files on this machine, through huggingface_hub's own cache.

Only what the model needs is fetched, small files first: where the weights are whole, so is the rest. Of GGUF files
it is the one that is named, with all the parts of a split one.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

from lamina.caller import option
from lamina.checkpoint.checkpoint import read_index
from lamina.checkpoint.choose import (
    choose_gguf,
    choose_weights,
    gguf_alone,
    gguf_models,
    local_names,
    parse_index,
    part_names,
    small_files,
)
from lamina.checkpoint.header import quote
from lamina.checkpoint.mistaken import lone_adapter
from lamina.errors import CheckpointError, MissingShardError, ModelNotFoundError, RequestError
from lamina.hub.repository import (
    HubOptions,
    HubRequest,
    Listing,
    RemoteFile,
    adapter_of,
    check_listed,
    choose_remote,
    clear_errors,
    in_subfolder,
    list_repository,
    write_outline,
)
from lamina.progress import Progress, Tally
from lamina.sizes import format_size


def locate(
    model: str | os.PathLike[str],
    *,
    variant: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **hub: Unpack[HubOptions],
) -> str:
    """The local folder (or file) of a model, after a download where it is needed.

    A path that exists is given back as it is. A hub id is downloaded into the cache that transformers uses too:
    config, tokenizer and chat templates, and of the weights the safetensors files that belong to the model.
    Where the hub does not answer, a whole copy in the cache is good enough.

    Args:
        model: a path or a hub id.
        variant: as transformers has it, such as `"fp16"`.
        trust_remote_code: fetch the repository's Python files as well.
        progress: called with the bytes.
        hub: see `HubOptions`; of a `subfolder` the folder of the whole repository is given back.

    Raises:
        ModelNotFoundError: neither a path nor a repository.
        RequestError: gated, a revision or variant that is not there, a refused token.
        UnsupportedError: no safetensors in the repository.
        MissingShardError: the cache alone may be used and has only part of the model.
        CheckpointError: no connection, no space, or a repository whose index is wrong.
    """
    if (path := local_path(model)) is not None:
        return path
    request = HubRequest(os.fspath(model), variant=variant, trust_remote_code=trust_remote_code, **hub)
    listing = list_repository(request)
    if isinstance(listing, Listing):
        return _download(request, listing, progress)
    return _whole_in_cache(request, listing)


def metadata_folder(
    model: str | os.PathLike[str], *, trust_remote_code: bool = False, **hub: Unpack[HubOptions]
) -> str:
    """A local folder with the config, the tokenizer and the chat templates of a model, its weights not needed.

    Arguments and errors are those of `locate`. For a path that exists it is that folder, or the folder of that file.
    """
    if (path := local_path(model)) is not None:
        return path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    request = HubRequest(os.fspath(model), trust_remote_code=trust_remote_code, **hub)
    listing = list_repository(request)
    if isinstance(listing, Listing):
        with clear_errors(request.model, request.revision):
            return _fetch_small(request, listing, ())
    return _snapshot_in_cache(request, listing)


def locate_gguf(
    model: str,
    name: str,
    *,
    progress: Progress | None = None,
    wanted: bool = True,
    **hub: Unpack[HubOptions],
) -> str:
    """The local path of a GGUF file of a repository, after a download where it is needed.

    Args:
        model: a hub id.
        name: of the file, or of any part of a split one, in the repository's `subfolder`; or a tag such as `Q4_K_M`
            that one of its files has in its name.
        progress: called with the bytes.
        wanted: download it; else it is only looked for in the cache (`outline_gguf` for its header alone).
        hub: see `HubOptions`.

    Raises:
        ModelNotFoundError: no such repository.
        RequestError: the repository has no such file, or several; gated, a revision that is not there, a refused token.
        MissingShardError: it is not in the cache and not wanted, or the repository lacks a part.
        CheckpointError: no connection, no space.
    """
    request = HubRequest(model, **hub)
    listing = list_repository(request)
    if not isinstance(listing, Listing):
        return _gguf_in_cache(request, name, listing)
    names = part_names(_chosen(request, listing.files, name))
    if missing := next((each for each in names if each not in listing.files), None):
        raise MissingShardError(f"{name} of {model} needs {missing}, which the repository does not have")
    if not wanted:
        return _in_cache(request, names, "")
    with clear_errors(model, request.revision):
        remember_commit(request)
        folder = download_files(request, listing, {each: listing.files[each] for each in names}, progress)
    return os.path.join(folder, names[0])


@contextmanager
def outline_gguf(model: str, name: str, **hub: Unpack[HubOptions]) -> Iterator[tuple[str, dict[str, str]]]:
    """A GGUF file of a repository as far as its header says what is in it: the rest reads as zeros. Not to be run.

    Args:
        model, name, hub: as of `locate_gguf`.

    Yields:
        The path of the file, or of the first part, in a folder that is gone afterwards; and what each part's address on
        the hub is, by its path.

    Raises:
        As `locate_gguf`.
    """
    request = HubRequest(model, **hub)
    listing = list_repository(request)
    if not isinstance(listing, Listing):
        raise CheckpointError(f"the header of {name} of {model} cannot be read: {listing}")
    names = part_names(_chosen(request, listing.files, name))
    if missing := next((each for each in names if each not in listing.files), None):
        raise MissingShardError(f"{name} of {model} needs {missing}, which the repository does not have")
    with clear_errors(model, request.revision), tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        paths = {}
        for each in names:
            path = os.path.join(folder, each)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_outline(request, listing, each, path)
            paths[path] = f"hf://{model}@{listing.commit}/{each}"
        yield next(iter(paths)), paths


def local_path(model: str | os.PathLike[str]) -> str | None:
    """The path where `model` is one that exists, None where it may be a hub id.

    Raises:
        ModelNotFoundError: it can only be a path, and nothing is there.
    """
    name = os.fspath(model)
    for path in (name, os.path.expanduser(name)):
        if os.path.exists(path):
            return path
    if not _can_only_be_a_path(name):
        return None
    folder, last = os.path.split(os.path.abspath(os.path.expanduser(name)))
    hint = ""
    if os.path.isdir(folder):
        close = difflib.get_close_matches(last, os.listdir(folder), n=3)
        hint = f", but {' and '.join(quote(each) for each in close)} in that folder" if close else ""
    raise ModelNotFoundError(f"there is nothing at the path {quote(name)}{hint}: check the path")


def _can_only_be_a_path(name: str) -> bool:
    return (
        name in ("", ".", "..")
        or name.startswith(("./", "../", "/", "~"))
        or name.count("/") > 1
        or name.lower().endswith((".gguf", ".safetensors"))
    )


def _download(request: HubRequest, listing: Listing, progress: Progress | None) -> str:
    if lone := adapter_of(request, listing):
        with clear_errors(request.model, request.revision):
            folder = _fetch_small(request, listing, [lone])
        with open(os.path.join(folder, lone), "rb") as file:
            raise lone_adapter(request.model, file.read())
    chosen = choose_remote(request, listing)
    with clear_errors(request.model, request.revision):
        indexes = [name for name in chosen if name.endswith(".json")]
        folder = _fetch_small(request, listing, [in_subfolder(request, name) for name in indexes])
        if indexes:
            index = os.path.join(folder, request.subfolder, indexes[0])
            chosen = sorted(set(parse_index(read_index(index), indexes[0]).values()))
            check_listed(request, listing, chosen, indexes[0])
        weights = {name: listing.files[name] for name in (in_subfolder(request, each) for each in chosen)}
        download_files(request, listing, weights, progress)
    return folder


def download_files(
    request: HubRequest, listing: Listing, files: Mapping[str, RemoteFile], progress: Progress | None
) -> str:
    """Brings files of a repository, as far as the cache does not have them; gives the folder of their snapshot."""
    total = sum(file.size or 0 for file in files.values())
    missing = sum(file.size or 0 for name, file in files.items() if not _is_cached(request, listing, name))
    _check_space(request, missing)
    counter = Tally(progress, "download", total, total - missing)
    counter.add(0)
    folder = _snapshot(request, listing.commit, files, counter)
    counter.reach(total)
    return folder


def remember_commit(request: HubRequest) -> None:
    """Lets the cache learn which commit the revision stands for, so that it is found there without the network."""
    _snapshot(request, request.revision, (), Tally(None, "download", 0))


def _fetch_small(request: HubRequest, listing: Listing, also: Iterable[str]) -> str:
    names = [*small_files(listing.files, request.subfolder, request.trust_remote_code), *also]
    # By the revision's own name, so that the cache learns which commit it stands for.
    folder = _snapshot(request, request.revision, names, Tally(None, "download", 0))
    if os.path.basename(folder) != listing.commit:
        raise CheckpointError(f"{request.model} was changed on the hub at this very moment: try again")
    return folder


def _snapshot(request: HubRequest, revision: str | None, names: Iterable[str], counter: Tally) -> str:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    log = logging.getLogger("huggingface_hub._snapshot_download")
    if not patterns:
        log.addFilter(_no_match_is_meant)
    try:
        return snapshot_download(
            request.model,
            revision=revision,
            cache_dir=request.cache_dir,
            token=request.token,
            allow_patterns=patterns,
            tqdm_class=_silent_bar(counter),
        )
    finally:
        log.removeFilter(_no_match_is_meant)


def _no_match_is_meant(record: logging.LogRecord) -> bool:
    return "No files matched" not in record.getMessage()


def _silent_bar(counter: Tally) -> type[Any]:
    """A progress bar class for huggingface_hub that draws nothing and hands the bytes on."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of its bars one counts bytes that are on disk; others count files, or bytes on the wire.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download" and kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                counter.add(int(n or 0))

    return SilentBar


def _cache(request: HubRequest) -> str:
    from huggingface_hub import constants

    return os.path.abspath(os.path.expanduser(request.cache_dir or constants.HF_HUB_CACHE))


def _is_cached(request: HubRequest, listing: Listing, name: str) -> bool:
    from huggingface_hub.file_download import repo_folder_name

    repository = os.path.join(_cache(request), repo_folder_name(repo_id=request.model, repo_type="model"))
    blob = listing.files[name].blob
    return os.path.exists(os.path.join(repository, "snapshots", listing.commit, name)) or (
        blob is not None and os.path.exists(os.path.join(repository, "blobs", blob))
    )


def _check_space(request: HubRequest, nbytes: int) -> None:
    place = _cache(request)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise CheckpointError(
            f"{request.model} needs {format_size(nbytes)} more in {_cache(request)}, where {format_size(free)} "
            f"are free: make room, or choose another place with {option('cache_dir')} or HF_HOME"
        )


def _snapshot_in_cache(request: HubRequest, why: str) -> str:
    if (folder := _cached_snapshot(request)) is None:
        at = f" at revision {request.revision!r}" if request.revision else ""
        raise ModelNotFoundError(
            f"{request.model}{at} is not in the cache {_cache(request)}, and {why}: "
            "run once with the network, or give a folder"
        )
    if not any(os.path.exists(os.path.join(folder, top, "config.json")) for top in ("", request.subfolder)):
        if gguf_models(names := local_names(folder)):
            raise gguf_alone(names, request.model)
        raise MissingShardError(f"{request.model} has no config.json in {folder}, and {why}: run once with the network")
    return folder


def _whole_in_cache(request: HubRequest, why: str) -> str:
    folder = _snapshot_in_cache(request, why)
    root = os.path.join(folder, request.subfolder)
    try:
        chosen = choose_weights(os.listdir(root) if os.path.isdir(root) else [], request.variant, root)
        if chosen[0].endswith(".json"):
            chosen = sorted(set(parse_index(read_index(os.path.join(root, chosen[0])), chosen[0]).values()))
    except CheckpointError as exc:
        raise MissingShardError(f"{exc}; {why}") from None
    missing = [name for name in chosen if not os.path.exists(os.path.join(root, name))]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(chosen)} weight files of {request.model} are not in {root} "
            f"(the first is {missing[0]}), and {why}: run once with the network"
        )
    return folder


def _chosen(request: HubRequest, names: Iterable[str], choice: str) -> str:
    """The path in the repository of the file that is meant."""
    exact = in_subfolder(request, choice)
    own = [name for name in names if name.startswith(in_subfolder(request, ""))]
    return exact if exact in own else choose_gguf(own, choice, request.model)


def _cached_snapshot(request: HubRequest) -> str | None:
    """The folder of what the cache has of a repository at the revision that is asked for; None where it has nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with clear_errors(request.model, request.revision, but=LocalEntryNotFoundError):
            # No pattern, no check: huggingface_hub would ask for every file that the repository has.
            return snapshot_download(
                request.model,
                revision=request.revision,
                cache_dir=request.cache_dir,
                local_files_only=True,
                allow_patterns=[],
            )
    except LocalEntryNotFoundError:
        return None


def _gguf_in_cache(request: HubRequest, name: str, why: str) -> str:
    """The file that is meant, of those that the cache has."""
    cached = _cached_snapshot(request)
    there = local_names(cached) if cached else []
    if not there:
        raise MissingShardError(f"{name} of {request.model} is not in the cache, and {why}: run with the network")
    try:
        chosen = _chosen(request, there, name)
    except RequestError as error:
        raise MissingShardError(f"in the cache, {error}; and {why}") from None
    return _in_cache(request, part_names(chosen), why)


def _in_cache(request: HubRequest, names: list[str], why: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(request.model, name, request.cache_dir, request.revision) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if not isinstance(path, str)]:
        raise MissingShardError(f"{missing[0]} of {request.model} is not in the cache, and {why}: run with the network")
    return str(found[0])
