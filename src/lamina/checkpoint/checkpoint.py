"""A checkpoint on disk: its weight files, and where in them each tensor lies."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lamina.checkpoint.extent import TensorEntry
from lamina.checkpoint.header import MAX_HEADER_BYTES, Fingerprint, missing_file, read_header_and_fingerprint
from lamina.checkpoint.strict import parse_object, quote, refuse_other_content
from lamina.errors import (
    ChangedError,
    CheckpointError,
    MissingShardError,
    MissingTensorError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".bin": "PyTorch pickles",
    ".pt": "PyTorch pickles",
    ".pth": "PyTorch pickles",
    ".ckpt": "PyTorch pickles",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
}
_ADAPTER_FILE = "adapter_model.safetensors"
_SHARD_NUMBER = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(.*)\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Which files hold which tensors.

    Attributes:
        root: absolute path of the folder, or `hf://{id}@{revision}`.
        files: absolute paths of the weight files, each once.
        tensors: every tensor by its name in the checkpoint.
        fingerprints: each local file as it was when its header was read.
    """

    root: str
    files: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.extent.length for entry in self.tensors.values())

    def verify_unchanged(self) -> None:
        """Looks whether each file still has the size and the time it was opened with.

        Raises:
            ChangedError: one has not, or is gone.
        """
        for file, opened in self.fingerprints.items():
            try:
                status = os.stat(file)
            except OSError as exc:
                raise ChangedError(
                    f"{file} is gone since it was opened ({exc.strerror}): load the model again"
                ) from None
            if status.st_size != opened.size:
                change = f"had {opened.size} bytes when it was opened and has {status.st_size} now"
            elif status.st_mtime_ns != opened.mtime_ns:
                change = "was written to since it was opened"
            else:
                continue
            raise ChangedError(f"{file} {change}: load the model again")


def open_checkpoint(path: str | os.PathLike[str], *, variant: str | None = None, subfolder: str = "") -> Checkpoint:
    """The checkpoint in a local folder or file, every header of it checked.

    Takes what transformers takes, in its order: `model.safetensors`, then `model.safetensors.index.json` with
    its shards; after these the loose `*.safetensors` of the folder. Links, as the hub's cache has them, are followed.

    Args:
        path: a folder, or one `.safetensors` file.
        variant: as transformers has it; `"fp16"` stands for `model.fp16.safetensors`.
        subfolder: where in the folder the weights are.

    Raises:
        ModelNotFoundError: nothing is at `path`.
        RequestError: no such subfolder or variant.
        UnsupportedError: weights in another format only.
        MissingShardError: a file that the index names is not there.
        MissingTensorError: a tensor that the index names is not in its file.
        HeaderError, TruncatedError: see `read_header`.
        CheckpointError: no weights, a bad index, a tensor in two files, or something that cannot be read.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not _is_folder(root):
        return _open_file(root)
    if subfolder:
        _check_subfolder(subfolder)
        root = os.path.join(root, subfolder)
        if not os.path.isdir(root):
            raise RequestError(f"there is no folder {root}: leave subfolder out, or name one that exists")
    names = _list_folder(root)
    single, index = (add_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    if single in names:
        return _open_shards(root, [single])
    if index in names:
        return _open_indexed(root, index, names)
    return _open_shards(root, _loose_files(root, names, variant))


def add_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` of variant `fp16` as transformers writes it, `model.fp16.safetensors`."""
    stem, ending = name.rsplit(".", 1)
    return f"{stem}.{variant}.{ending}" if variant else name


def parse_index(raw: bytes, name: str) -> dict[str, str]:
    """The weight map of an index: which file holds each tensor, both by name.

    Args:
        raw: the JSON text.
        name: how errors call the index.

    Raises:
        CheckpointError: not an index, or one that names files outside its folder.
    """
    refuse_other_content(raw[:32], name)
    weight_map = parse_object(raw, name, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name} has no weight_map that says which file holds which tensor: fetch it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{name} gives tensor {quote(tensor)} a file that is not text: fetch it again")
    for file in set(weight_map.values()):
        if not _is_plain_name(file):
            raise CheckpointError(
                f"{name} names the file {quote(file)}, which is not a plain name in its own folder: "
                "do not trust this checkpoint"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{name} names the file {quote(file)}, which is no safetensors file: fetch it again")
    return weight_map


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], index: str) -> None:
    """Compares what an index promises with what the headers hold.

    Raises:
        MissingTensorError: a tensor is in none of the files, or in another than the index says.
    """
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None or os.path.basename(entry.extent.file) != file:
            raise MissingTensorError(
                f"{index} says that tensor {quote(name)} is in {file}, which does not hold it: fetch both again"
            )


def merge_tensors(shards: Iterable[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """The tensors of several files as one mapping.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    merged: dict[str, TensorEntry] = {}
    for shard in shards:
        if twice := next((name for name in shard if name in merged), None):
            first, second = (os.path.basename(each[twice].extent.file) for each in (merged, shard))
            raise CheckpointError(
                f"tensor {quote(twice)} is both in {first} and in {second}: "
                "keep one of the files, or add the index that says which to take"
            )
        merged.update(shard)
    return merged


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by this user: change its permissions") from None
    except (OSError, ValueError):  # ValueError: a NUL byte in it
        if os.path.lexists(path):
            raise CheckpointError(missing_file(path)) from None
        shown = path if path.isprintable() else quote(path)
        raise ModelNotFoundError(
            f"there is no model at {shown}: give a folder, a .safetensors file or a hub id"
        ) from None


def _check_subfolder(subfolder: str) -> None:
    if os.path.isabs(subfolder) or ".." in subfolder.split("/") or "\0" in subfolder:
        raise RequestError(f"subfolder {quote(subfolder)} must be a folder inside the model's own")


def _open_file(path: str) -> Checkpoint:
    name = os.path.basename(path)
    if name.endswith(".safetensors"):
        return _open_shards(os.path.dirname(path), [name])
    if name.endswith(".safetensors.index.json"):
        root = os.path.dirname(path)
        return _open_indexed(root, name, _list_folder(root))
    form = _OTHER_FORMATS.get(os.path.splitext(name)[1].lower())
    if form is None:
        raise UnsupportedError(f"{path} is no weights file: give the folder of a model, or a .safetensors file")
    raise UnsupportedError(f"{path} holds {form}, which cannot be streamed yet: convert it to safetensors")


def _list_folder(root: str) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except PermissionError:
        raise CheckpointError(f"{root} may not be read by this user: change its permissions") from None
    except OSError as exc:
        raise CheckpointError(f"{root} cannot be listed: {exc.strerror}") from exc


def _open_shards(root: str, names: Iterable[str]) -> Checkpoint:
    read = {(file := os.path.join(root, name)): read_header_and_fingerprint(file) for name in names}
    tensors = merge_tensors(found for found, _ in read.values())
    return Checkpoint(root, tuple(read), tensors, {file: fingerprint for file, (_, fingerprint) in read.items()})


def _open_indexed(root: str, index: str, names: list[str]) -> Checkpoint:
    weight_map = parse_index(_read_index(os.path.join(root, index)), index)
    shards = sorted(set(weight_map.values()))
    missing = sorted(set(shards).difference(names)) or [each for each in shards if _is_broken_link(root, each)]
    if missing:
        others = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        raise MissingShardError(f"{index} needs {missing[0]}{others}: {missing_file(os.path.join(root, missing[0]))}")
    checkpoint = _open_shards(root, shards)
    check_index(weight_map, checkpoint.tensors, index)
    return checkpoint


def _is_broken_link(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    return os.path.islink(path) and not os.path.exists(path)


def _read_index(path: str) -> bytes:
    try:
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is not a file" if os.path.exists(path) else missing_file(path))
        if os.path.getsize(path) > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_HEADER_BYTES} bytes, too many for an index")
        with open(path, "rb") as handle:
            return handle.read()
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by this user: change its permissions") from None
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc


def _is_plain_name(name: str) -> bool:
    return name.isprintable() and os.path.basename(name) == name and "\\" not in name and name not in ("", ".", "..")


def _loose_files(root: str, names: list[str], variant: str | None) -> list[str]:
    """The weight files of a folder that has none of the usual names."""
    loose = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if variant:
        found = [name for name in loose if re.search(rf"\.{re.escape(variant)}[-.]", name)]
        if loose and not found:
            raise RequestError(f"{root} has no variant {quote(variant)}, only {', '.join(loose[:4])}")
        loose = found
    if loose == [_ADAPTER_FILE]:
        raise UnsupportedError(f"{root} holds an adapter, not a model: give the model that it belongs to")
    if not loose:
        raise _no_weights(root, names)
    _check_numbering(root, loose)
    return loose


def _check_numbering(root: str, names: list[str]) -> None:
    """Without an index, only `-00001-of-00003` tells that a shard is missing."""
    matches = [match for name in names if (match := _SHARD_NUMBER.fullmatch(name))]
    for stem, digits, count, ending in {(each[1], len(each[2]), each[3], each[4]) for each in matches}:
        shards = (f"{stem}-{number:0{digits}d}-of-{count}{ending}.safetensors" for number in range(1, int(count) + 1))
        if missing := next((shard for shard in shards if shard not in names), None):
            raise MissingShardError(f"{root} lacks {missing}, which the names of the others call for: fetch it again")


def _no_weights(root: str, names: list[str]) -> CheckpointError | UnsupportedError:
    for name in names:
        if form := _OTHER_FORMATS.get(os.path.splitext(name)[1].lower()):
            return UnsupportedError(
                f"{root} holds {form} only ({name}), which cannot be streamed yet: convert them to safetensors"
            )
    return CheckpointError(f"there are no weights in {root}: it needs {SINGLE_FILE}, or {INDEX_FILE} and its shards")
