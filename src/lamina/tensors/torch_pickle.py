"""Weights in torch's pickles (`pytorch_model.bin`, `*.pt`, `*.pth`), streamed where they are.

What `torch.save` writes is an archive whose members are not compressed, one for each storage: so every tensor is a
run of bytes of the file, as in safetensors. torch's own reader for files of strangers (`weights_only`) tells names,
shapes and places without a byte of the weights; it builds tensors and plain containers and refuses everything else,
so nothing that a file holds is ever run. Every place is then checked against the archive's own directory.

The format of torch before 1.6 is no archive: a pickle, and the storages one after another behind it.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import torch

from lamina.checkpoint import Extent, Fingerprint, TensorEntry
from lamina.checkpoint.header import missing_file, quote, refuse_other_content
from lamina.errors import CheckpointError, HeaderError, LaminaError, MissingShardError, TruncatedError, UnsupportedError
from lamina.tensors.disk import TORCH_DTYPES

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of an archive: signature, lengths of name and extra field
INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where trainers keep the weights among other things
DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_pickled(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], Fingerprint]:
    """The tensors of one pickled file, and the fingerprint of the very file that was read.

    Raises:
        MissingShardError: there is no such file.
        TruncatedError: it ends before its tensors do.
        HeaderError: it holds something that is no tensor, or says something that cannot be true.
        UnsupportedError: tensors that are not plain runs of numbers.
        CheckpointError: not a regular file, not readable, a Git LFS pointer or a web page.
    """
    file = os.path.abspath(path)
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise CheckpointError(f"{file} is not a regular file, so its weights cannot be read in place")
        with open(file, "rb") as handle:
            status = os.fstat(handle.fileno())
            return _read(handle, file, status.st_size), Fingerprint.of(status)
    except FileNotFoundError:
        raise MissingShardError(missing_file(file)) from None
    except PermissionError:
        raise CheckpointError(f"{file} may not be read by this user: change its permissions") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _read(handle: IO[bytes], file: str, size: int) -> dict[str, TensorEntry]:
    name = os.path.basename(file)
    start = handle.read(len(LEGACY))
    handle.seek(0)
    if start[:4] != ZIP:
        refuse_other_content(start, name)
    if start[:4] != ZIP and start != LEGACY:
        if size < len(LEGACY):
            raise TruncatedError(f"{name} has {size} bytes, fewer than any pickle: fetch it again")
        raise HeaderError(f"{name} is nothing that torch.save writes: it is damaged, fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if start == LEGACY:
                content, places = _read_legacy(handle, name, size)
            else:
                content = torch.load(handle, map_location="meta", weights_only=True)
                places = _members(handle, name, size)
    except (LaminaError, OSError):
        raise
    except Exception as error:  # a damaged or hostile pickle can raise whatever its reader does
        raise _unreadable(name, error) from error
    return {key: _entry(key, tensor, places, file, name) for key, tensor in _state(content, name).items()}


def _unreadable(name: str, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())
    if "central directory" in text or "End-of-central" in text or isinstance(error, EOFError):
        return TruncatedError(f"{name} ends before its directory: the download is incomplete, fetch it again")
    if "Weights only load failed" in text or isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL:? ([\w.]+)", text)
        return HeaderError(
            f"{name} holds more than tensors{f' ({named[1]})' if named else ''}, and to read that could run code: "
            "if you trust it, load it with torch and save its tensors as safetensors"
        )
    return HeaderError(f"{name} cannot be read ({text[:160] or type(error).__name__}): it is damaged, fetch it again")


def _state(content: object, name: str) -> dict[str, torch.Tensor]:
    """The tensors by name, wherever in the file they are."""
    for key in ("", *INSIDE):
        inner = content if not key else content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping):
            tensors = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
            if tensors:
                return tensors
    raise HeaderError(f"{name} holds a {type(content).__name__} without tensors by name: it is no model's weights")


def _entry(key: str, tensor: torch.Tensor, places: Mapping[int, int], file: str, name: str) -> TensorEntry:
    where = f"tensor {quote(key)} in {name}"
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.dtype not in DTYPES or tensor.is_conj() or tensor.is_neg():
        raise UnsupportedError(f"{where} is no plain tensor ({tensor.dtype}): save it again as safetensors")
    if not tensor.numel():
        return TensorEntry(key, DTYPES[tensor.dtype], tuple(tensor.shape), Extent(file, 0, 0))
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{where} is a view whose elements do not follow one another (strides {tensor.stride()}): "
            "load it with torch and save its tensors as safetensors"
        )
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None or places.get(begin) != storage.nbytes():
        raise HeaderError(f"{where} lies where the file has no such member: the file is damaged, fetch it again")
    first, nbytes = tensor.storage_offset() * tensor.element_size(), tensor.numel() * tensor.element_size()
    if first + nbytes > storage.nbytes():
        raise HeaderError(f"{where} is larger than what it is stored in: the file is damaged, fetch it again")
    return TensorEntry(key, DTYPES[tensor.dtype], tuple(tensor.shape), Extent(file, begin + first, nbytes))


def _members(handle: IO[bytes], name: str, size: int) -> dict[int, int]:
    """First byte and length of each storage in an archive."""
    places: dict[int, int] = {}
    with zipfile.ZipFile(handle) as archive:
        for member in archive.infolist():
            _, _, last = member.filename.partition("/")
            if last == "byteorder" and archive.read(member) != b"little":
                raise UnsupportedError(f"{name} was written with the bytes of a number in another order: save it again")
            if not last.startswith("data/"):
                continue
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise UnsupportedError(f"{name} is compressed, so it cannot be streamed: save it again with torch.save")
            handle.seek(member.header_offset)
            signature, of_name, of_extra = LOCAL_HEADER.unpack(handle.read(LOCAL_HEADER.size))
            begin = member.header_offset + LOCAL_HEADER.size + of_name + of_extra
            if signature != ZIP or begin + member.file_size > size:
                raise HeaderError(f"{name} has a directory that is not true: the file is damaged, fetch it again")
            places[begin] = member.file_size
    return places


def _read_legacy(handle: IO[bytes], name: str, size: int) -> tuple[Any, dict[int, int]]:
    """The content of a file of torch before 1.6, and its storages: each is its number of elements, then these."""
    from torch._weights_only_unpickler import Unpickler

    storages: dict[str, torch.storage.TypedStorage] = {}

    def storage(saved: tuple[Any, ...]) -> torch.storage.TypedStorage:
        kind, storage_type, key, _, count, view = saved
        if kind != "storage" or view is not None:
            raise UnsupportedError(f"{name} was written by torch before 0.4: load it with torch and save it again")
        if key not in storages:
            storages[key] = _meta_storage(storage_type.dtype, count)
        return storages[key]

    def load() -> Any:
        unpickler: Any = Unpickler(handle, encoding="utf-8")
        unpickler.persistent_load = storage
        return unpickler.load()

    _, protocol, system = load(), load(), load()
    if protocol != LEGACY_PROTOCOL or not system.get("little_endian"):
        raise UnsupportedError(f"{name} is in a format of torch that is not known here: load it and save it again")
    content, keys = load(), load()
    places, at = {}, handle.tell()
    for key in keys:
        handle.seek(at)
        (count,) = struct.unpack("<q", handle.read(8))
        untyped = storages[key]._untyped_storage
        if count * storages[key].dtype.itemsize != untyped.nbytes():
            raise HeaderError(f"{name} has a storage of {count} elements where another number was said: fetch it again")
        untyped._checkpoint_offset = at + 8
        places[at + 8] = untyped.nbytes()
        at += 8 + untyped.nbytes()
    if at > size:
        raise TruncatedError(
            f"{name} ends at byte {size}, its tensors at {at}: the download is incomplete, fetch it again"
        )
    return content, places


def _meta_storage(dtype: torch.dtype, count: int) -> torch.storage.TypedStorage:
    typed: Any = torch.storage.TypedStorage
    untyped: Any = torch.UntypedStorage
    storage: torch.storage.TypedStorage = typed(
        wrap_storage=untyped(count * dtype.itemsize, device="meta"), dtype=dtype, _internal=True
    )
    return storage
