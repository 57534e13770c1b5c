"""The headers of a checkpoint that is still on the hub, by range requests: some kilobytes of each file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lamina.checkpoint.checkpoint import Checkpoint
from lamina.checkpoint.choose import check_subfolder, index_dtype, is_pickled, parse_index
from lamina.checkpoint.extent import TensorEntry
from lamina.checkpoint.header import MAX_HEADER_BYTES, PREFIX_BYTES, header_length, parse_header
from lamina.checkpoint.hub_errors import clear_errors, transport_error
from lamina.checkpoint.manifest import MANIFEST, apply_manifest, parse_manifest
from lamina.checkpoint.mistaken import ADAPTER_CONFIG, lone_adapter
from lamina.checkpoint.repository import (
    HubRequest,
    Listing,
    Token,
    adapter_of,
    check_listed,
    choose_remote,
    in_subfolder,
    list_repository,
)
from lamina.checkpoint.shards import judged_dtype, merge_indexed, merge_tensors
from lamina.errors import CheckpointError, UnsupportedError

_FIRST_BYTES = 100_000
"""Asked for at once. By huggingface_hub's count, 97% of the headers of its 1000 top models are shorter."""

_REQUESTS_AT_ONCE = 8
_TRIES = 4


def remote_headers(
    model: str,
    *,
    revision: str | None = None,
    token: Token = None,
    subfolder: str = "",
    variant: str | None = None,
) -> Checkpoint:
    """The checkpoint of a repository from its headers alone; no weights are fetched, nothing is written.

    Extents have `hf://{id}@{commit}/{file}` as their file. Arguments as in `lamina.checkpoint.hub.locate`.

    Raises:
        ModelNotFoundError, RequestError, UnsupportedError, MissingShardError: as `locate`.
        HeaderError, TruncatedError: as `open_checkpoint`.
        CheckpointError: no connection, or an answer that makes no sense.
    """
    with clear_errors(model, revision):
        request = HubRequest(model, revision, token=token, subfolder=check_subfolder(subfolder), variant=variant)
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
