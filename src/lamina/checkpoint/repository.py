"""What the hub says about a repository: its commit, its files, their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lamina.caller import option
from lamina.checkpoint.choose import (
    INDEX_ENDING,
    INDEX_FILE,
    PICKLED_ENDINGS,
    PICKLED_FILE,
    SINGLE_FILE,
    choose_weights,
)
from lamina.checkpoint.gguf_name import gguf_alone, gguf_models
from lamina.checkpoint.hub_errors import first_line, is_unreachable, translate, transport_error
from lamina.checkpoint.mistaken import ADAPTER_CONFIG, adapter_alone, instead_of_weights
from lamina.errors import CheckpointError, MissingShardError

Token = str | bool | None
"""A token, True for the saved one, False for none, None for the saved one if there is one."""


def offline() -> str:
    """Why nothing was asked of the hub."""
    return f"this run may not use the network (HF_HUB_OFFLINE or {option('local_files_only', True)})"


@dataclass(frozen=True, slots=True)
class HubRequest:
    """Which model of the hub, and where it goes."""

    model: str
    revision: str | None = None
    cache_dir: str | None = None
    token: Token = None
    subfolder: str = ""
    variant: str | None = None
    trust_remote_code: bool = False


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
    top = f"{request.subfolder}/" if request.subfolder else ""
    names = [name[len(top) :] for name in listing.files if name.startswith(top) and "/" not in name[len(top) :]]
    where = f"{request.model}{'/' if top else ''}{top.rstrip('/')}"
    # transformers cannot read Mistral's own layout, so a repository that has only this has no weights.
    own = [name for name in names if not name.startswith("consolidated")]
    if not any(name.endswith((".safetensors", INDEX_ENDING, *PICKLED_ENDINGS)) for name in own):
        files = [name for name in listing.files if name.startswith(top)]  # some keep each in a folder of its own
        if gguf_models(files):
            raise gguf_alone(files, request.model)
        if known := instead_of_weights(names, where):
            raise known
        ends = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE)
        if inside := sorted({name.rpartition("/")[0] for name in files if name.endswith(ends)}):
            raise CheckpointError(
                f"there are no weights in {where} but in folders of it ({', '.join(inside[:4])}): name one, such as "
                f"from_pretrained(..., subfolder={inside[0]!r})"
            )
    return choose_weights(own, request.variant, where)


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
