"""Which codec each tensor of a checkpoint gets: decided by what the model does with it, never by its name.

Linears, experts and lookup tables are coded. Norms, biases, routers, convolutions, buffers, weights that are used in
any other way, and tensors that this model does not use at all stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from lamina.checkpoint import Checkpoint, TensorEntry
from lamina.checkpoint.manifest import PLAIN
from lamina.codec import AFFINE, LOSSLESS
from lamina.errors import UnsupportedError
from lamina.hf.experts import experts_by_config
from lamina.hf.recorder import weight_names
from lamina.hf.trace import Trace
from lamina.store.encode import BLOCK_ELEMENTS
from lamina.store.shards import Run, Stored, file_nbytes, make_files
from lamina.tensors.disk import DiskTensor
from lamina.tensors.expressions import Box, Computed, sources_of
from lamina.weights.describe import Weights

FLOATS = ("BF16", "F16", "F32")
PANEL_ROWS = (256, 192, 128, 96, 64, 32)  # of a lossless panel: few least common multiples with blocks of 256
TABLE_PANEL_ROWS = 16  # where rows are looked up one by one
HEAD_CODECS = ("q8", "q6", "q5", "q4")
FOUR_BIT_SHARE = 0.30  # of the model in bf16: what the head gets is what is left below it


class Role(Enum):
    """What the model does with a weight."""

    LINEAR = "linear"
    EXPERT = "expert"
    TABLE = "table"
    HEAD = "head"  # of the output, tied to the table or not


RECIPES: Mapping[str, Mapping[Role, str]] = {
    PLAIN: {},
    "8bit": dict.fromkeys(Role, "q8"),
    "4bit": {Role.LINEAR: "q4", Role.EXPERT: "q4", Role.TABLE: "q4", Role.HEAD: HEAD_CODECS[0]},
    "lossless": dict.fromkeys(Role, LOSSLESS.name),
}


@dataclass(frozen=True, slots=True)
class _Use:
    """A weight of the model and the checkpoint tensors that it is made of, in its own order."""

    weight: str
    sources: tuple[str, ...]
    role: Role | None
    boxes: tuple[Box, ...]
    looked_up: bool = False
    joined: bool = True


def make_runs(model: Any, checkpoint: Checkpoint, traced: Trace, weights: Weights, compression: str) -> tuple[Run, ...]:
    """Every tensor of the checkpoint with its codec, in the order in which a pass needs them.

    Lossless panels have no size yet: that takes a look at the numbers.
    """
    uses = list(_uses(model, traced, weights))
    uses += _copies(model, checkpoint, uses)
    layers = sorted(weights.schedule.layers, key=len, reverse=True)
    coded = _coded(uses, checkpoint, RECIPES[compression])
    runs = [run for run in _runs(uses, layers, checkpoint, coded) if run.tensors]
    return tuple(_fit_head(runs, coded, uses) if compression == "4bit" else runs)


def _runs(
    uses: Iterable[_Use], layers: Sequence[str], checkpoint: Checkpoint, coded: Mapping[str, tuple[str, int]]
) -> Iterator[Run]:
    """The tensors in the order of their uses, each once; those without any come last, by their names.

    Args:
        layers: the longest names first.
    """
    seen: set[str] = set()
    for use in uses:
        unit = next((layer for layer in layers if use.weight.startswith(f"{layer}.")), "")
        tensors = tuple(_stored(checkpoint.tensors[name], coded) for name in use.sources if name not in seen)
        seen.update(use.sources)
        yield from [Run(unit, tensors)] if use.joined else [Run(unit, (each,)) for each in tensors]
    for name in sorted(set(checkpoint.tensors) - seen):
        yield Run("", (_stored(checkpoint.tensors[name], {}),))


def check_coded(runs: Iterable[Run], root: str, compression: str) -> None:
    """Refuse a store of fewer bytes that would have as many.

    Raises:
        UnsupportedError: no tensor gets a codec.
    """
    if compression != PLAIN and all(each.codec == PLAIN for run in runs for each in run.tensors):
        raise UnsupportedError(
            f"nothing in {root} can be stored as {compression}: its weights are quantised already, or used in ways "
            "that no codec knows; use it as it is"
        )


def _uses(model: Any, traced: Trace, weights: Weights) -> Iterator[_Use]:
    """The weights in the order of a pass; those that it does not touch come last."""
    named = weight_names(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    output = getattr(head, "weight", None)
    for name in {**traced.root.touched(), **dict.fromkeys(named)}:
        tensor = named.get(name)
        if not isinstance(tensor, DiskTensor):
            continue
        if tensor.boxes is None or any(isinstance(box.source, Computed) for box in tensor.boxes):
            yield _Use(name, tuple(sources_of(tensor.expression)), None, (), joined=False)
            continue
        boxes = tuple(sorted(tensor.boxes, key=lambda box: box.start))
        role = _role(name, tensor, traced, weights, experts_by_config(model.config), tensor is output)
        looked_up = "embedding" in traced.uses.get(name, ())
        yield _Use(name, tuple(dict.fromkeys(str(box.source) for box in boxes)), role, boxes, looked_up)


def _copies(model: Any, checkpoint: Checkpoint, uses: Iterable[_Use]) -> list[_Use]:
    """Tensors that a checkpoint holds under a second name, though the model has tied them to the first."""
    used = {source for use in uses for source in use.sources}
    names = getattr(model, "all_tied_weights_keys", None) or {}
    found = [name for name in names if name in checkpoint.tensors and name not in used]
    return [_Use(name, (name,), Role.HEAD, (), looked_up=True) for name in found]


def _role(
    name: str, tensor: DiskTensor, traced: Trace, weights: Weights, counts: frozenset[int], is_output: bool
) -> Role | None:
    weight = weights.schedule.weights[name]
    if weight.always or tensor.dim() < 2 or _is_router(name, tensor, traced, counts):
        return None
    uses = traced.uses.get(name, frozenset())
    if uses == {"experts"}:
        return Role.EXPERT
    if uses == {"embedding"}:
        return Role.TABLE
    if uses and uses <= {"linear", "embedding"} and tensor.dim() == 2:
        return Role.HEAD if is_output or "embedding" in uses else Role.LINEAR
    return None


def _is_router(name: str, tensor: DiskTensor, traced: Trace, counts: frozenset[int]) -> bool:
    """Whether this weight says where tokens go: by the trace, or where that does not tell, by a row for each expert."""
    if any(name.startswith(f"{router}.") for router in traced.routers.values()):
        return True
    return not set(traced.routed) <= set(traced.routers) and tensor.dim() == 2 and tensor.shape[0] in counts


def _coded(uses: Sequence[_Use], checkpoint: Checkpoint, recipe: Mapping[Role, str]) -> dict[str, tuple[str, int]]:
    """Codec and rows of a panel for each tensor that gets one."""
    chosen: dict[str, tuple[str, int]] = {}
    refused: set[str] = set()
    for use in uses:
        ways = _ways(use, checkpoint, recipe)
        for name in use.sources:
            if name not in ways or chosen.setdefault(name, ways[name]) != ways[name]:  # two uses, two ways
                refused.add(name)
    return {name: each for name, each in chosen.items() if name not in refused}


def _ways(use: _Use, checkpoint: Checkpoint, recipe: Mapping[Role, str]) -> dict[str, tuple[str, int]]:
    """Codec and rows of a panel for each tensor of a weight; none where one of them cannot be stored so."""
    codec = PLAIN if use.role is None else recipe.get(use.role, PLAIN)
    entries = {name: checkpoint.tensors[name] for name in use.sources}
    if codec == PLAIN or not all(_may(entry, codec) for entry in entries.values()):
        return {}
    ways = {name: (codec, _panel_rows(use, entry, codec)) for name, entry in entries.items()}
    whole = all(_whole_rows(box, entries[str(box.source)].shape, ways[str(box.source)][1]) for box in use.boxes)
    return ways if whole else {}


def _panel_rows(use: _Use, entry: TensorEntry, codec: str) -> int:
    """Rows of a panel: one, but for lossless ones, which hold many, though not more than are encoded at once.

    The last panel takes as many bytes as the others: the number that leaves it fullest is taken.
    """
    if codec != LOSSLESS.name:
        return 1
    if use.looked_up:
        return TABLE_PANEL_ROWS
    rows, columns = entry.shape[-2:]
    fitting = [each for each in PANEL_ROWS if each * columns <= BLOCK_ELEMENTS] or [PANEL_ROWS[-1]]
    return min(fitting, key=lambda each: (-rows % each, -each))


def _may(entry: TensorEntry, codec: str) -> bool:
    if entry.encoding is not None or len(entry.shape) < 2 or not all(entry.shape):
        return False
    if codec == LOSSLESS.name:
        return entry.dtype == "BF16"
    return entry.dtype in FLOATS and AFFINE[codec].panel_bytes(entry.shape[-1]) < 2 * entry.shape[-1]


def _whole_rows(box: Box, shape: tuple[int, ...], panel_rows: int) -> bool:
    """Whether a box is whole rows of its source, one after another, from the first of a panel to the last of one."""
    view, columns = box.view, shape[-1]
    if view.shape[-1] != columns or not view.is_contiguous() or box.start[-1] != 0:
        return False
    first, matrix = int(view.storage_offset()), columns * shape[-2]
    ends = (first, first + view.numel())
    return all(at % columns == 0 and (at % matrix == 0 or at % matrix // columns % panel_rows == 0) for at in ends)


def _stored(entry: TensorEntry, coded: Mapping[str, tuple[str, int]]) -> Stored:
    if entry.name not in coded:
        return Stored(entry.name, entry.dtype, entry.shape)
    codec, rows = coded[entry.name]
    panel_bytes = 0 if codec == LOSSLESS.name else AFFINE[codec].panel_bytes(entry.shape[-1])
    return Stored(entry.name, entry.dtype, entry.shape, codec, rows, panel_bytes)


def _fit_head(runs: Sequence[Run], coded: Mapping[str, tuple[str, int]], uses: Iterable[_Use]) -> Sequence[Run]:
    """The output head gets as many bits as the share of the whole leaves it."""
    heads = {name for use in uses if use.role is Role.HEAD for name in use.sources if name in coded}
    limit = FOUR_BIT_SHARE * sum(bf16_nbytes(tensor) for run in runs for tensor in run.tensors)
    for codec in HEAD_CODECS:
        fitted = [_with_codec(run, codec, heads) for run in runs]
        if sum(file_nbytes(file) for file in make_files(fitted, padded=True)) <= limit:
            break
    return fitted


def _with_codec(run: Run, codec: str, names: Collection[str]) -> Run:
    encoder = AFFINE[codec]
    return replace(
        run,
        tensors=tuple(
            replace(each, codec=codec, panel_bytes=encoder.panel_bytes(each.columns)) if each.name in names else each
            for each in run.tensors
        ),
    )


def bf16_nbytes(tensor: Stored) -> int:
    """Bytes of a tensor if its numbers were bf16."""
    elements = torch.Size(tensor.shape).numel()
    return 2 * elements if tensor.dtype in FLOATS else tensor.source_nbytes
