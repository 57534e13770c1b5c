"""A checkpoint on disk: its weight files, and where in them each tensor lies.

Which of several files a tensor is taken from, and which dtype they speak for, are transformers' rules: a folder must
give the same model here as there.
"""

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
from lamina.checkpoint.header import MAX_HEADER_BYTES, Fingerprint, missing_file, quote, read_header_and_fingerprint
from lamina.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    apply_manifest,
    check_files,
    partial_store,
    read_manifest,
    weight_files,
)
from lamina.checkpoint.mistaken import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_alone,
    folder_inside,
    in_parts,
    is_archive,
    lone_adapter,
    other_format,
)
from lamina.errors import (
    ChangedError,
    CheckpointError,
    MissingShardError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)

FLOATS = ("F64", "F32", "F16", "BF16")
"""What a whole model can be computed in."""

STATED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""As the metadata of an index has them, in torch's words."""

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
                    f"of these is unknown: load the model again"
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
    if JOURNAL in names:
        raise partial_store(root)
    if not ADAPTER_WEIGHTS.isdisjoint(names) and adapter_alone(names):
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
    if (known := in_parts([name, *_possible_parts(root, name)], root)) is not None:
        raise known
    raise UnsupportedError(f"{path} is no weights file: give the folder of a model, or a .safetensors file")


def _possible_parts(root: str, name: str) -> list[str]:
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


def merge_tensors(shards: Iterable[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """The tensors of several files as one mapping.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    merged: dict[str, TensorEntry] = {}
    for shard in shards:
        twice = next((name for name in shard if name in merged), None)
        if twice is not None:
            first, second = (os.path.basename(each[twice].extent.file) for each in (merged, shard))
            raise CheckpointError(
                f"tensor {quote(twice)} is both in {first} and in {second}: "
                "keep the files of one model only, or fetch it again"
            )
        merged.update(shard)
    return merged


def merge_indexed(
    shards: Sequence[Mapping[str, TensorEntry]], weight_map: Mapping[str, str], index: str
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """The tensors of the files that an index names, and what has to be said about them.

    An index may be older than its files. A tensor that lies in another of them than it says is taken from there, and
    one that none of them holds is missed only if the model wants it. Of one that several hold, it is the copy that
    the index names, else that of the last file.

    Args:
        shards: what each file holds, in the order of their names.
        weight_map: as the index has it.
        index: its name.
    """
    merged: dict[str, TensorEntry] = {}
    twice: dict[str, tuple[str, str]] = {}
    for shard in shards:
        for name, entry in shard.items():
            kept = merged.get(name)
            if kept is not None:
                files = os.path.basename(kept.extent.file), os.path.basename(entry.extent.file)
                twice.setdefault(name, files)
                if files[0] == weight_map.get(name):
                    continue
            merged[name] = entry
    if not twice:
        return merged, ()
    name = next(iter(twice))
    which = f"tensors {quote(name)} and {len(twice) - 1} more are" if len(twice) > 1 else f"tensor {quote(name)} is"
    used = os.path.basename(merged[name].extent.file)
    why = f"as {index} says" if weight_map.get(name) == used else f"the last, for {index} does not say"
    return merged, (f"{which} in two files ({' and '.join(twice[name])}): {used} is used, {why}",)


def judged_dtype(tensors: Mapping[str, TensorEntry], stated: str = "") -> str | None:
    """The dtype that transformers computes a model in where neither its config nor the user names one.

    It is that of the first tensor of floats: by name in a safetensors file, in a pickle as the file has it.

    Args:
        tensors: those of the first file.
        stated: what the metadata of the index says, which goes first.
    """
    if stated in STATED:
        return STATED[stated]
    pickled = any(not entry.extent.file.endswith(".safetensors") for entry in tensors.values())
    names = tensors if pickled else sorted(tensors)
    return next((tensors[name].dtype for name in names if tensors[name].dtype in FLOATS), None)
