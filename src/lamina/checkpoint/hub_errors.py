"""What can go wrong between here and the hub, each as one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamina.caller import option
from lamina.errors import CheckpointError, LaminaError, ModelNotFoundError, RequestError

_AGAIN = "try again, finished files are kept"


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
