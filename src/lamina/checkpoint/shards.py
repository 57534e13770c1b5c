"""Several files as one checkpoint: which of them a tensor is taken from, and which dtype they speak for.

Both are transformers' rules, for a folder must give the same model here as there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from lamina.checkpoint.extent import TensorEntry
from lamina.checkpoint.strict import quote
from lamina.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
"""What a whole model can be computed in."""

STATED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""As the metadata of an index has them, in torch's words."""


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
