"""A checkpoint on disk: its weight files, and where in them each tensor lies."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lamina.checkpoint.choose import (
    INDEX_ENDING,
    INDEX_FILE,
    PICKLED_INDEX_ENDING,
    check_subfolder,
    choose_weights,
    index_dtype,
    is_pickled,
    parse_index,
)
from lamina.checkpoint.extent import TensorEntry
from lamina.checkpoint.header import MAX_HEADER_BYTES, Fingerprint, missing_file, read_header_and_fingerprint
from lamina.checkpoint.manifest import (
    MANIFEST,
    apply_manifest,
    check_files,
    is_partial,
    partial_store,
    read_manifest,
    weight_files,
)
from lamina.checkpoint.mistaken import (
    ADAPTER_CONFIG,
    adapter_alone,
    folder_inside,
    in_parts,
    is_archive,
    lone_adapter,
    other_format,
)
from lamina.checkpoint.shards import judged_dtype, merge_indexed, merge_tensors
from lamina.checkpoint.strict import quote
from lamina.errors import (
    ChangedError,
    CheckpointError,
    MissingShardError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)

FileReader = Callable[[str], tuple[dict[str, TensorEntry], Fingerprint]]
"""Gives the tensors of one weight file, by its absolute path, and its fingerprint."""


@dataclass(frozen=True)
class Checkpoint:
    """Which files hold which tensors.

    Attributes:
        root: absolute path of the folder, or `hf://{id}@{revision}`.
        files: absolute paths of the weight files, each once.
        tensors: every tensor by its name in the checkpoint.
        fingerprints: each local file as it was when its header was read.
        row_orders: for tensors whose rows a file holds in another order: row i of the tensor is its row `order[i]`.
        dtype: what a model is computed in whose config does not say: see `judged_dtype`. None where nothing tells.
        fallbacks: what had to be decided because the files do not agree.
        absent: tensors that the index promises and no file holds, with the file that it names. Not all are needed.
    """

    root: str
    files: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    row_orders: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dtype: str | None = None
    fallbacks: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.extent.length for entry in self.tensors.values())

    def verify_unchanged(self) -> None:
        """Looks whether each file still has the size and the times it was opened with.

        Raises:
            ChangedError: one has not, or is gone.
        """
        for file, opened in self.fingerprints.items():
            try:
                status = os.stat(file)
            except OSError:
                raise ChangedError(f"{file} is gone since it was opened: load the model again") from None
            now = Fingerprint.of(status)
            opened.verify(now, file)
            if opened.touched(now) and now.place == opened.place:
                raise ChangedError(
                    f"{file} was written to, renamed, linked or had its rights changed since it was opened, and which "
                    f"of these cannot be told: load the model again"
                )


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    subfolder: str = "",
    read_pickled: FileReader | None = None,
) -> Checkpoint:
    """The checkpoint in a local folder or file, every header of it checked.

    Takes what transformers takes, in its order: `model.safetensors`, then `model.safetensors.index.json` with
    its shards; after these the loose `*.safetensors` of the folder, and then `pytorch_model.bin`, its index, and
    whatever other pickle is the only one. Links, as the hub's cache has them, are followed.
    A folder that `lamina split` wrote is known by its manifest.

    Args:
        path: a folder, one weight file, or one index.
        variant: as transformers has it; `"fp16"` stands for `model.fp16.safetensors`.
        subfolder: where in the folder the weights are.
        read_pickled: finds the tensors in one of torch's pickles, for which torch is needed: see
            `lamina.tensors.torch_pickle`. Without it pickled weights are refused.

    Raises:
        ModelNotFoundError: nothing is at `path`.
        RequestError: no such subfolder or variant.
        UnsupportedError: weights in another format only.
        MissingShardError: a file that the index names is not there.
        HeaderError, TruncatedError: see `read_header`.
        CheckpointError: no weights, a bad index, without one a tensor in two files, or something that cannot be read.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not _is_folder(root):
        return _open_file(root, read_pickled)
    if subfolder:
        root = os.path.join(root, check_subfolder(subfolder))
        if not os.path.isdir(root):
            raise RequestError(f"there is no folder {root}: leave subfolder out, or name one that exists")
    names = _list_folder(root)
    if MANIFEST in names:
        return _open_store(root, variant)
    if is_partial(names):
        raise partial_store(root)
    if adapter_alone(names):
        raise lone_adapter(root, _small_file(os.path.join(root, ADAPTER_CONFIG)))
    try:
        chosen = choose_weights(names, variant, root)
    except CheckpointError as error:
        if type(error) is CheckpointError and (inside := folder_inside(root)) is not None:
            raise CheckpointError(f"there are no weights in {root}: {inside}") from None
        raise
    if chosen[0].endswith(".json"):
        return _open_indexed(root, chosen[0], names, read_pickled)
    return _open_shards(root, chosen, read_pickled)


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


def _open_file(path: str, read_pickled: FileReader | None) -> Checkpoint:
    root, name = os.path.split(path)
    if name.endswith((".safetensors", INDEX_ENDING)) and os.path.exists(os.path.join(root, MANIFEST)):
        raise RequestError(f"{path} is a part of a store: give its folder, {root}")
    if name.endswith(".safetensors") or is_pickled(name):
        return _open_shards(root, [name], read_pickled)
    if name.endswith((INDEX_ENDING, PICKLED_INDEX_ENDING)):
        return _open_indexed(root, name, _list_folder(root), read_pickled)
    if form := other_format(name):
        raise UnsupportedError(f"{path} is {form}")
    if name.lower().endswith(".gguf"):
        raise UnsupportedError(f"{path} is a GGUF file: lamina.checkpoint.gguf.open_gguf reads it")
    if is_archive(name):
        raise UnsupportedError(f"{path} is an archive: unpack it, and give the folder that comes out")
    if (known := in_parts([name, *_beside(root, name)], root)) is not None:
        raise known
    raise UnsupportedError(f"{path} is no weights file: give the folder of a model, or a .safetensors file")


def _beside(root: str, name: str) -> list[str]:
    """The files that may be parts of the same one."""
    stem = re.split(r"\.(?:part|split)|[.-]\d+$", name)[0]
    return [each for each in _list_folder(root) if each.startswith(stem)]


def _small_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as handle:
            return handle.read(MAX_HEADER_BYTES)
    except OSError:
        return None


def _list_folder(root: str) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except PermissionError:
        raise CheckpointError(f"{root} may not be read by this user: change its permissions") from None
    except OSError as exc:
        raise CheckpointError(f"{root} cannot be listed: {exc.strerror}") from exc


def _open_store(root: str, variant: str | None) -> Checkpoint:
    if variant:
        raise RequestError(f"{root} was written by `lamina split`, it has no variant {quote(variant)}")
    manifest = read_manifest(root)
    check_files(manifest, root)
    stored = _open_shards(root, weight_files(manifest))
    tensors = apply_manifest(manifest, stored.tensors)
    stated = index_dtype(read_index(os.path.join(root, INDEX_FILE)), INDEX_FILE) if INDEX_FILE in manifest.files else ""
    return replace(stored, tensors=tensors, dtype=judged_dtype(tensors, stated))


def _open_shards(
    root: str,
    names: Iterable[str],
    read_pickled: FileReader | None = None,
    merge: Callable[[Sequence[Mapping[str, TensorEntry]]], tuple[dict[str, TensorEntry], tuple[str, ...]]]
    | None = None,
    stated_dtype: str = "",
) -> Checkpoint:
    read = {}
    for file in (os.path.join(root, name) for name in names):
        if is_pickled(file) and read_pickled is None:
            raise UnsupportedError(f"{file} is a PyTorch pickle, which cannot be read here: pass read_pickled")
        reader = read_pickled if is_pickled(file) and read_pickled is not None else read_header_and_fingerprint
        read[file] = reader(file)
    shards = [found for found, _ in read.values()]
    tensors, fallbacks = merge(shards) if merge is not None else (merge_tensors(shards), ())
    fingerprints = {file: fingerprint for file, (_, fingerprint) in read.items()}
    dtype = judged_dtype(shards[0], stated_dtype)
    return Checkpoint(root, tuple(read), tensors, fingerprints, dtype=dtype, fallbacks=fallbacks)


def _open_indexed(root: str, index: str, names: list[str], read_pickled: FileReader | None) -> Checkpoint:
    raw = read_index(os.path.join(root, index))
    weight_map = parse_index(raw, index)
    shards = sorted(set(weight_map.values()))
    missing = sorted(set(shards).difference(names)) or [each for each in shards if _is_broken_link(root, each)]
    if missing:
        others = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        raise MissingShardError(f"{index} needs {missing[0]}{others}: {missing_file(os.path.join(root, missing[0]))}")
    merge = functools.partial(merge_indexed, weight_map=weight_map, index=index)
    opened = _open_shards(root, shards, read_pickled, merge, index_dtype(raw, index))
    return replace(opened, absent={name: file for name, file in weight_map.items() if name not in opened.tensors})


def _is_broken_link(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    return os.path.islink(path) and not os.path.exists(path)


def read_index(path: str) -> bytes:
    """The text of an index. Raises CheckpointError where it cannot be read or is too big to be one."""
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
