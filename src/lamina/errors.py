"""The one exception tree.

Every error that a user can meet says what, where, wanted, got and what to do, in one line. The command
line catches `LaminaError` once; everything else that escapes is a bug.

    LaminaError
    ├── RequestError            the request is wrong: an argument, a model that does not exist
    │   ├── ModelNotFoundError
    │   ├── UnsupportedError    a right request that this version, device or package cannot serve
    │   │   └── StorageError    a weight without memory of its own is asked for it; a NotImplementedError too
    │   ├── TokenError          an id that is no row of the table it is looked up in; an IndexError too
    │   └── BudgetError         the memory is too small; carries `minimum_bytes`
    ├── CheckpointError         what is on disk is not a whole checkpoint
    │   ├── HeaderError         a safetensors header that cannot be trusted
    │   ├── TruncatedError      a file shorter than its header or index says
    │   ├── MissingShardError   the index names a file that is not there
    │   ├── MissingTensorError  the model wants a tensor that no file holds
    │   └── ChangedError        a file is not what it was when the checkpoint was opened
    ├── WriteError              the operating system refused a write: a full disk, a folder without permission
    ├── ReadError               the operating system refused a read while streaming
    └── ClosedError             the stream was closed and is asked for weights
"""

from __future__ import annotations


class LaminaError(Exception):
    """Root of every error that Lamina raises on purpose."""


class RequestError(LaminaError):
    """The request itself is wrong: a bad argument, a wrong combination."""


class ModelNotFoundError(RequestError):
    """No such folder, file or hub id."""


class UnsupportedError(RequestError):
    """The request makes sense, but not with this version, device or set of packages."""


class StorageError(UnsupportedError, NotImplementedError):
    """A weight that streams or is packed has no memory of its own to be pointed at, shared or given another shape.

    Also what torch raises for tensors without a storage, which libraries that only look for shared memory expect.
    """


class TokenError(RequestError, IndexError):
    """An id that is no row of the table it is looked up in: a token outside of the vocabulary, a text too long."""


class BudgetError(RequestError):
    """The memory budget is below what the model needs.

    Attributes:
        minimum_bytes: the smallest budget, in bytes, that is enough for the same request.
    """

    def __init__(self, message: str, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


class CheckpointError(LaminaError):
    """What is on disk is not a whole, readable checkpoint."""


class HeaderError(CheckpointError):
    """A safetensors header that cannot be trusted."""


class TruncatedError(CheckpointError):
    """A file is shorter than its header or index says."""


class MissingShardError(CheckpointError):
    """An index names a file that is not there."""


class MissingTensorError(CheckpointError):
    """The model wants a tensor that no file holds, or holds in another shape."""


class ChangedError(CheckpointError):
    """A file is not what it was when the checkpoint was opened."""


class WriteError(LaminaError):
    """The operating system refused a write, or there is too little room for what is to be written.

    Attributes:
        fact: what was refused, without what to do about it, which depends on what it was for.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        super().__init__(f"{fact}: {advice}" if advice else fact)
        self.fact = fact


class ReadError(LaminaError):
    """The operating system refused a read while weights were streaming."""


class ClosedError(LaminaError):
    """The stream was closed, and something still asks it for weights."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
