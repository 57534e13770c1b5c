"""`save_pretrained` for a model whose weights are not in memory: one piece of one weight after another.

What is written is what transformers would write: the same names, merged weights taken apart again by transformers' own
rules, the same files. The rules run on tensors without memory, which write down what is done to them; each weight is
then read, converted and written in pieces of a few megabytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from lamina.atomic_files import NewFile, check_room, refusals, write_whole
from lamina.errors import RequestError
from lamina.hf import internals
from lamina.hf.internals import silent
from lamina.sizes import parse_size
from lamina.tensors.disk import TORCH_DTYPES, DiskTensor, materialize, recording
from lamina.tensors.expressions import replay

PIECE = 16 << 20  # bytes of a weight that are in memory at once
SHARD = "50GB"  # transformers' own
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def save_pretrained(
    plain: Callable[..., Any],
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = SHARD,
    variant: str | None = None,
    save_original_format: bool = True,
    **options: Any,
) -> None:
    """See `transformers.PreTrainedModel.save_pretrained`; weights that stream are read as they are written.

    Args:
        plain: transformers' own, of this model.

    Raises:
        RequestError: the folder is a file; or the model is to be pushed at once.
        WriteError: the operating system refused, or there is too little room.
    """
    folder = os.fspath(save_directory)
    here = state_dict is not None and not any(getattr(each, "home", None) for each in state_dict.values())
    if here or internals.has_adapters(model) or options.get("distributed_checkpoint"):
        options |= {"state_dict": state_dict, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
        options |= {"variant": variant, "save_original_format": save_original_format}
        plain(folder, is_main_process=is_main_process, **options)
        return
    if push_to_hub:
        raise RequestError("push_to_hub=True would hold all weights in memory: use model.push_to_hub(name) instead")
    if os.path.isfile(folder):
        raise RequestError(f"{folder} is a file: name a folder to save the model in")
    with silent():
        plain(folder, is_main_process=is_main_process, state_dict={}, variant=variant, **options)
    if not is_main_process:
        return
    leaves = _leaves(model, dict(state_dict or model.state_dict(keep_vars=True)))
    meant = _meant(model, leaves, save_original_format)
    _write(folder, meant, leaves, parse_size(max_shard_size, what="max_shard_size"), variant, model)


def _leaves(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model holds, by the names that are saved: of a tied weight the one that loading expects."""
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    tied: set[str] = internals.tied_names(model)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(getattr(tensor, "home", None) or tensor), []).append(name)
    for names in groups.values():
        for name in names:
            if name != _kept_of(names, tied):
                del state[name]
    return state


def _kept_of(names: list[str], tied: set[str]) -> str:
    """The name, of several of one weight, that loading does not derive from another."""
    return next((name for name in names if not any(re.search(pattern, name) for pattern in tied)), names[0])


def _meant(model: Any, leaves: Mapping[str, torch.Tensor], original: bool) -> dict[str, DiskTensor]:
    """The tensors to write, each with what makes it of those that the model holds."""
    named = {name: DiskTensor.of(name, tensor.shape, tensor.dtype) for name, tensor in leaves.items()}
    if not original:
        return named
    with recording():
        return {name: tensor.contiguous() for name, tensor in internals.as_published(model, named).items()}


def _write(
    folder: str,
    meant: Mapping[str, DiskTensor],
    leaves: Mapping[str, torch.Tensor],
    most: int,
    variant: str | None,
    model: Any,
) -> None:
    base = f"model.{variant}" if variant else "model"
    shards = split_state_dict_into_shards_factory(
        dict(meant),
        get_storage_size=_nbytes,
        filename_pattern=base + "{suffix}.safetensors",
        max_shard_size=most,
        get_storage_id=lambda tensor: None,
    )
    check_room(folder, sum(map(_nbytes, meant.values())))
    for old in os.listdir(folder):
        if old.startswith(base) and _NUMBERED.search(old) and old not in shards.filename_to_tensors:
            os.unlink(os.path.join(folder, old))
    index = f"{base}.safetensors.index.json"
    with refusals(os.path.join(folder, index)):
        if os.path.exists(os.path.join(folder, index)):
            os.unlink(os.path.join(folder, index))  # until it is written anew the folder is no checkpoint
    for file, names in shards.filename_to_tensors.items():
        _write_file(folder, file, {name: meant[name] for name in names}, leaves)
    if shards.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **shards.metadata}
        text = json.dumps({"metadata": metadata, "weight_map": shards.tensor_to_filename}, indent=2, sort_keys=True)
        write_whole(folder, index, (text + "\n").encode())


def _write_file(folder: str, file: str, tensors: Mapping[str, DiskTensor], leaves: Mapping[str, torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + _nbytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with NewFile(folder, file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written = out.nbytes
            for piece in _pieces(tensor, leaves):
                out.write(piece.contiguous().flatten().view(torch.uint8).numpy())
            if out.nbytes - written != _nbytes(tensor):
                raise AssertionError(f"{name}: {out.nbytes - written} bytes came, not {_nbytes(tensor)}")
        out.commit()


def _pieces(tensor: DiskTensor, leaves: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, a few megabytes at a time where its place in one weight is known."""
    if not tensor.numel():
        return
    boxes = sorted(tensor.boxes or (), key=lambda box: box.start)
    if not boxes or tensor.dim() == 0 or any(any(box.start[1:]) for box in boxes):  # else they follow one another
        yield replay(tensor.expression, lambda name: materialize(leaves[name]).detach().cpu())
        return
    for box in boxes:
        assert isinstance(box.source, str)
        leaf, rows = leaves[box.source], box.view.shape[0]
        step = max(PIECE // max(_nbytes(box.view) // rows, 1), 1)
        for first in range(0, rows, step):
            yield _part(leaf, box.view[first : first + step]).to(tensor.dtype)


def _part(leaf: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The elements of a leaf that a meta view says, of as few of its rows as hold them."""
    row = max(leaf.numel() // leaf.shape[0], 1) if leaf.dim() else 1
    low = int(view.storage_offset())
    high = low + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    first, last = low // row, high // row + 1
    held = _rows(leaf, first, last - first)
    flat = held.contiguous().flatten()
    at = flat.storage_offset() + low - first * row  # of a stride's elements, counted in the memory that is viewed
    return flat.as_strided(view.shape, view.stride(), at).detach().cpu()


def _rows(leaf: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows of a leaf, read if they are on disk."""
    home = getattr(leaf, "home", None)
    if home is None:
        return leaf.detach()[first : first + count] if leaf.dim() else leaf.detach()
    rows: torch.Tensor = home.part(first, count)
    return rows


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
