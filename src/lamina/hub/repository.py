"""What the hub says about a repository: its commit, its files, the headers of its weights, and what goes wrong there.

Headers are read by range requests: some kilobytes of each file.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from lamina.caller import option
from lamina.checkpoint.checkpoint import Checkpoint, judged_dtype, merge_indexed, merge_tensors
from lamina.checkpoint.choose import (
    INDEX_ENDING,
    INDEX_FILE,
    PICKLED_ENDINGS,
    PICKLED_FILE,
    SINGLE_FILE,
    check_subfolder,
    choose_weights,
    gguf_alone,
    gguf_models,
    index_dtype,
    is_pickled,
    parse_index,
)
from lamina.checkpoint.extent import TensorEntry
from lamina.checkpoint.gguf import gguf_extents
from lamina.checkpoint.header import MAX_HEADER_BYTES, PREFIX_BYTES, header_length, parse_header
from lamina.checkpoint.manifest import MANIFEST, apply_manifest, parse_manifest
from lamina.checkpoint.mistaken import ADAPTER_CONFIG, adapter_alone, instead_of_weights, lone_adapter
from lamina.errors import (
    CheckpointError,
    LaminaError,
    MissingShardError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)

_AGAIN = "try again, finished files are kept"

_FIRST_BYTES = 100_000
"""Asked for at once. By huggingface_hub's count, 97% of the headers of its 1000 top models are shorter."""

_REQUESTS_AT_ONCE = 8

_OUTLINES = (4 << 20, 16 << 20, 64 << 20, 512 << 20)
"""Bytes of a GGUF file that are asked for, until its header is among them: vocabularies take 2 to 12 MB."""

_SMALL = 1 << 16  # bytes of a tensor that a config may be in

_TRIES = 4

Token = str | bool | None
"""A token, True for the saved one, False for none, None for the saved one if there is one."""


class HubOptions(TypedDict, total=False):
    """What says where on the hub, or in its cache, a model is: arguments of `from_pretrained`.

    Attributes:
        revision: branch, tag or commit of the repository.
        cache_dir: another cache than huggingface_hub's own.
        token: see `Token`.
        local_files_only: use the cache alone, as `HF_HUB_OFFLINE=1` does.
        subfolder: where in the repository the model is.
    """

    revision: str | None
    cache_dir: str | None
    token: Token
    local_files_only: bool
    subfolder: str


HUB_OPTIONS = tuple(HubOptions.__annotations__)
"""The names of `HubOptions`."""

ANY_MODEL_OPTIONS = ("cache_dir", "token", "local_files_only")
"""Of these, what holds for every model, a draft as well."""

SOURCE_OPTIONS = (*HUB_OPTIONS, "variant", "trust_remote_code")
"""What says where a model comes from, and which files of it are meant."""


def offline() -> str:
    """Why nothing was asked of the hub."""
    return f"this run may not use the network (HF_HUB_OFFLINE or {option('local_files_only', True)})"


@dataclass(frozen=True, slots=True)
class HubRequest:
    """Which model of the hub, and where it goes.

    Raises:
        RequestError: the subfolder leads out of the repository.
    """

    model: str
    revision: str | None = None
    cache_dir: str | None = None
    token: Token = None
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "subfolder", check_subfolder(self.subfolder))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository: bytes where the hub says them, and the name of its blob in the cache."""

    size: int | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit: its files by their path in it."""

    commit: str
    files: dict[str, RemoteFile]


def list_repository(request: HubRequest) -> Listing | str:
    """The files of the repository; where the hub gives no answer, the reason why.

    Raises:
        LaminaError: the hub answers, and refuses.
    """
    from huggingface_hub import HfApi, constants, errors

    if request.local_files_only:
        return offline()
    try:
        info = HfApi(token=request.token).model_info(
            request.model, revision=request.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except errors.OfflineModeIsEnabled:
        return offline()
    except (OSError, ValueError, transport_error()) as exc:
        if is_unreachable(exc):
            return f"the hub cannot be reached ({first_line(exc)})"
        raise translate(exc, request.model, request.revision) from exc
    if not info.sha or info.siblings is None:
        raise CheckpointError(f"the hub's answer for {request.model} lists no files: check HF_ENDPOINT")
    files = {
        each.rfilename: RemoteFile(each.size, each.lfs.sha256 if each.lfs else each.blob_id) for each in info.siblings
    }
    return Listing(info.sha, files)


def choose_remote(request: HubRequest, listing: Listing) -> list[str]:
    """`choose_weights` for a repository: file names without the subfolder. Raises what that raises."""
    top = in_subfolder(request, "")
    files = [name for name in listing.files if name.startswith(top)]  # some keep each model in a folder of its own
    names = [name[len(top) :] for name in files if "/" not in name[len(top) :]]
    where = f"{request.model}/{request.subfolder}" if request.subfolder else request.model
    # transformers cannot read Mistral's own layout, so a repository that has only this has no weights.
    own = [name for name in names if not name.startswith("consolidated")]
    has_weights = any(name.endswith((".safetensors", INDEX_ENDING, *PICKLED_ENDINGS)) for name in own)
    if not has_weights and (known := _instead(request, files, names, where)):
        raise known
    return choose_weights(own, request.variant, where)


def _instead(request: HubRequest, files: list[str], names: list[str], where: str) -> LaminaError | None:
    """What a repository without weights has in their place, in the folder that is meant (`names`) or in those in it."""
    if gguf_models(files):
        return gguf_alone(files, request.model)
    if known := instead_of_weights(names, where):
        return known
    ends = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE)
    if inside := sorted({name.rpartition("/")[0] for name in files if name.endswith(ends)}):
        return CheckpointError(
            f"there are no weights in {where} but in folders of it ({', '.join(inside[:4])}): name one, such as "
            f"from_pretrained(..., subfolder={inside[0]!r})"
        )
    return None


def adapter_of(request: HubRequest, listing: Listing) -> str | None:
    """The config of the adapter that a repository is in place of a model; None where it is something else."""
    top = in_subfolder(request, "")
    alone = adapter_alone([name[len(top) :] for name in listing.files if name.startswith(top)])
    config = in_subfolder(request, ADAPTER_CONFIG)
    return config if alone and config in listing.files else None


def in_subfolder(request: HubRequest, name: str) -> str:
    """The path in the repository of a file that is named without the subfolder."""
    return f"{request.subfolder}/{name}" if request.subfolder else name


def check_listed(request: HubRequest, listing: Listing, shards: Iterable[str], index: str) -> None:
    """Raises MissingShardError where the repository lacks a file that its own index names."""
    for name in shards:
        if in_subfolder(request, name) not in listing.files:
            raise MissingShardError(f"{index} of {request.model} needs {name}, which the repository does not have")


def remote_headers(
    model: str,
    *,
    revision: str | None = None,
    token: Token = None,
    subfolder: str = "",
    variant: str | None = None,
) -> Checkpoint:
    """The checkpoint of a repository from its headers alone; no weights are fetched, nothing is written.

    Extents have `hf://{id}@{commit}/{file}` as their file. Arguments as in `lamina.hub.locate`.

    Raises:
        ModelNotFoundError, RequestError, UnsupportedError, MissingShardError: as `locate`.
        HeaderError, TruncatedError: as `open_checkpoint`.
        CheckpointError: no connection, or an answer that makes no sense.
    """
    with clear_errors(model, revision):
        request = HubRequest(model, revision, token=token, subfolder=subfolder, variant=variant)
        listing = list_repository(request)
        if isinstance(listing, str):
            raise CheckpointError(f"the headers of {model} cannot be read: {listing}")
        weight_map: dict[str, str] = {}
        fallbacks: tuple[str, ...] = ()
        stated = ""
        if adapter_of(request, listing):
            raise lone_adapter(model, _whole_file(request, listing, ADAPTER_CONFIG))
        files = choose_remote(request, listing)
        if files[0].endswith(".json"):
            index = files[0]
            weight_map, stated = _read_index(request, listing, index)
            files = sorted(set(weight_map.values()))
        if is_pickled(files[0]):
            raise UnsupportedError(
                f"{model} has pickled weights only ({files[0]}), which no header describes: download it, then plan"
            )
        shards = _remote_shards(request, listing, files)
        if weight_map:
            tensors, fallbacks = merge_indexed(shards, weight_map, index)
        else:
            tensors = merge_tensors(shards)
        first = shards[0]
        if in_subfolder(request, MANIFEST) in listing.files:
            stored = parse_manifest(_whole_file(request, listing, MANIFEST), _address(request, listing, MANIFEST))
            first = tensors = apply_manifest(stored, tensors)
    addresses = tuple(_address(request, listing, name) for name in files)
    dtype = judged_dtype(first, stated)
    return Checkpoint(_address(request, listing), addresses, tensors, dtype=dtype, fallbacks=fallbacks)


def _read_index(request: HubRequest, listing: Listing, index: str) -> tuple[dict[str, str], str]:
    """The file of each tensor by its name, all of them in the repository; and the dtype that an index states."""
    raw = _whole_file(request, listing, index)
    weight_map, stated = parse_index(raw, index), index_dtype(raw, index)
    check_listed(request, listing, sorted(set(weight_map.values())), index)
    return weight_map, stated


def _remote_shards(request: HubRequest, listing: Listing, files: list[str]) -> list[dict[str, TensorEntry]]:
    """The headers of these files, several at once: a 405B model has 191, one by one that is a minute of waiting."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "lamina-headers") as pool:
        return list(pool.map(partial(_remote_header, request, listing), files))


def _address(request: HubRequest, listing: Listing, name: str = "") -> str:
    path = in_subfolder(request, name).rstrip("/")
    return f"hf://{request.model}@{listing.commit}{'/' if path else ''}{path}"


def _remote_header(request: HubRequest, listing: Listing, name: str) -> dict[str, TensorEntry]:
    start, size = _fetch(request, listing, name, 0, _FIRST_BYTES)
    end = PREFIX_BYTES + header_length(start[:32], size, name)
    if end > len(start):
        start += _fetch(request, listing, name, len(start), end)[0]
    return parse_header(start[PREFIX_BYTES:end], size, _address(request, listing, name))


def _whole_file(request: HubRequest, listing: Listing, name: str) -> bytes:
    size = listing.files[in_subfolder(request, name)].size
    if size is not None and size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name} of {request.model} has {size} bytes, too many for an index")
    return _fetch(request, listing, name, 0, size or MAX_HEADER_BYTES)[0]


def write_outline(request: HubRequest, listing: Listing, name: str, path: str) -> None:
    """Write a GGUF file of its full length of which the header and the small tensors are true; the rest is zeros."""
    for nbytes in _OUTLINES:
        start, size = _fetch(request, listing, name, 0, nbytes)
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(size)
        try:
            extents = gguf_extents(path)
        except CheckpointError:  # the header is longer than what is there
            if len(start) == size or nbytes == _OUTLINES[-1]:
                raise
            continue
        if min((extent.offset for extent in extents), default=0) <= len(start):
            break
    with open(path, "r+b") as file:
        for extent in extents:
            if extent.length <= _SMALL and extent.offset + extent.length > len(start):
                file.seek(extent.offset)
                file.write(_fetch(request, listing, name, extent.offset, extent.offset + extent.length)[0])


def _fetch(request: HubRequest, listing: Listing, name: str, begin: int, end: int) -> tuple[bytes, int]:
    """Bytes `begin` to `end` of a file, fewer where it ends before, and its size."""
    from huggingface_hub.errors import HfHubHTTPError

    for tries_left in reversed(range(_TRIES)):
        try:
            return _fetch_once(request, listing, name, begin, end)
        except transport_error() as exc:
            if isinstance(exc, HfHubHTTPError) or not tries_left:
                raise
    raise AssertionError("unreachable")


def _fetch_once(request: HubRequest, listing: Listing, name: str, begin: int, end: int) -> tuple[bytes, int]:
    from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

    path = in_subfolder(request, name)
    url = hf_hub_url(request.model, path, revision=listing.commit)
    # Compressed, a range would be a range of something else.
    ranged = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {
        "headers": {**build_hf_headers(token=request.token), **ranged},
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "follow_redirects": True,
        # It would try again inside the block too, which a context manager cannot do.
        "retry_on_exceptions": (),
    }
    with http_stream_backoff("GET", url, **options) as response:
        hf_raise_for_status(response)
        # A server that knows no ranges sends the file from its start: leave as soon as there is enough.
        skipped = 0 if response.status_code == 206 else begin
        size = listing.files[path].size or _size_from(response)
        wanted = skipped + min(end, size) - begin
        received = bytearray()
        for chunk in response.iter_bytes(chunk_size=1 << 16):
            received += chunk
            if len(received) >= wanted:
                break
    if len(received) < wanted:
        raise CheckpointError(f"the hub sent {len(received)} of {wanted} bytes of {name}: try again")
    return bytes(received[skipped:wanted]), size


def _size_from(response: Any) -> int:
    total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    if not total.isdigit():
        raise CheckpointError("the hub does not say how long a file is: check HF_ENDPOINT")
    return int(total)


@contextmanager
def clear_errors(model: str, revision: str | None, but: type[Exception] = LaminaError) -> Iterator[None]:
    """Turns what huggingface_hub raises inside the block into one of Lamina's errors; what is a `but` passes.

    Raises:
        ModelNotFoundError: not an id, or no repository of that name.
        RequestError: a revision that is not there, a gated or disabled repository, a refused token.
        CheckpointError: no connection, no space, or an answer that is not the hub's.
    """
    try:
        yield
    except (LaminaError, but):
        raise
    except (OSError, ValueError, transport_error()) as exc:
        raise translate(exc, model, revision) from exc


def is_unreachable(exc: BaseException) -> bool:
    """Whether the hub gave no answer, or none of use, so that the cache is the best there is."""
    from huggingface_hub import errors

    if isinstance(exc, errors.HfHubHTTPError):
        return bool(exc.response.status_code >= 500)
    return isinstance(exc, transport_error())


def first_line(exc: BaseException) -> str:
    """The name of an exception and the first line of what it says."""
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__


def translate(exc: BaseException, model: str, revision: str | None) -> LaminaError:
    """The one of Lamina's errors that stands for `exc`."""
    from huggingface_hub import errors

    if isinstance(exc, errors.HFValidationError):
        return ModelNotFoundError(f"{model!r} is neither a path that exists nor a hub id such as 'Qwen/Qwen3-0.6B'")
    if isinstance(exc, errors.HfHubHTTPError):
        return _from_answer(exc, model, revision)
    if isinstance(exc, errors.LocalTokenNotFoundError):
        return RequestError(f"no token is saved for {model}: run `hf auth login`, or pass one with {option('token')}")
    if isinstance(exc, (errors.LocalEntryNotFoundError, transport_error(), errors.OfflineModeIsEnabled)):
        return CheckpointError(f"the hub cannot be reached for {model} ({first_line(exc)}): {_AGAIN}")
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk became full while {model} was downloaded: free space, or choose another place with "
            f"{option('cache_dir')}"
        )
    if isinstance(exc, PermissionError):
        return CheckpointError(
            f"{exc.filename} may not be written by this user: choose another place with {option('cache_dir')}"
        )
    return CheckpointError(f"{model} could not be downloaded ({first_line(exc)}): {_AGAIN}")


def _from_answer(exc: Any, model: str, revision: str | None) -> LaminaError:
    from huggingface_hub import errors

    status = exc.response.status_code
    if isinstance(exc, errors.GatedRepoError):
        return RequestError(
            f"{model} is gated: ask for access at https://huggingface.co/{model}, "
            f"then run `hf auth login` or pass {option('token')}"
        )
    if isinstance(exc, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no {model} on the hub, nor a folder of that name here: check the name, "
            f"and pass {option('token')} if it is private"
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return RequestError(f"{model} has no revision {revision!r}: name a branch, tag or commit that exists")
    if isinstance(exc, errors.EntryNotFoundError):
        return CheckpointError(f"the hub lists a file of {model} that it does not have: {_AGAIN}")
    if isinstance(exc, errors.DisabledRepoError):
        return RequestError(f"{model} was disabled on the hub: choose another model")
    if status in (401, 403):
        return RequestError(f"the hub refused the token for {model} (status {status}): run `hf auth login` again")
    if status == 429:
        return CheckpointError(f"the hub has had too many requests from here: wait some minutes, then {_AGAIN}")
    return CheckpointError(f"the hub answered with status {status} for {model}: {_AGAIN}")


def transport_error() -> type[Exception]:
    """The base class of what the HTTP client raises: of httpx in huggingface_hub 1, of httpx2 in 2."""
    from huggingface_hub import errors

    error: type[Exception] = vars(errors)["HTTPError"]
    return error
